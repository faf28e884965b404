// A field for a method: those that there are, or a spelling of one's own.

import { h } from "./dom.js";
import { KEEP } from "./choice.js";

const OWN = "own";

export function methodField(select, own, onChange) {
  let known = new Set();
  const value = () => (select.value === OWN ? own.value.trim() : select.value);
  select.addEventListener("change", () => {
    own.hidden = select.value !== OWN;
    if (select.value === OWN) own.focus();
    else onChange(value());
  });
  own.addEventListener("change", () => value() && onChange(value()));
  return {
    /** Offer methods, those first that keep the function. */
    fill(methods) {
      const option = (one) => h("option", { value: one.name }, `${one.name}: ${one.title}`);
      const offered = methods.filter((one) => one.name !== KEEP);
      known = new Set([KEEP, "", ...offered.map((one) => one.name)]);
      select.replaceChildren(
        h("option", { value: KEEP }, "batch: stays as it is"),
        h("optgroup", { label: "Keep the eval function exactly" }, ...offered.filter((one) => one.exact).map(option)),
        h("optgroup", { label: "Approximate it" }, ...offered.filter((one) => !one.exact).map(option)),
        h("option", { value: OWN }, "another spelling, with options…"));
    },
    get: value,
    set(text) {
      if (document.activeElement === own) return;
      const isOwn = !known.has(text);
      select.value = isOwn ? OWN : text;
      if (!select.value) select.selectedIndex = 0;
      own.hidden = !isOwn;
      own.value = isOwn ? text : "";
    },
  };
}
