// One site: what it is, and what each method would mean there, with the reasons.

import { wantedAt } from "./choice.js";
import { byId, h, shown } from "./dom.js";
import { activationOf, effectOf, mapOf, producerOf } from "./sitestable.js";

const MEANS = { exact: "keeps the eval function exactly", approx: "approximates it", refused: "refused", "": "not known yet" };

export function siteDialog(onTake, onForget) {
  const dialog = byId("site-dialog");
  let path = "";
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "take") return;
    const taken = new FormData(byId("site-form")).get("method");
    if (taken === "") onForget(path);
    else if (taken !== null) onTake(path, taken);
  });
  dialog.addEventListener("click", (event) => {
    // The button that Enter presses is the first that submits: these do not.
    const leaves = event.target === dialog || event.target.closest(".close, #site-cancel");
    if (leaves) dialog.close("cancel");
  });

  return (site, cells, methods, choice, known) => {
    path = site.path;
    byId("site-title").replaceChildren(h("bdi", { class: "path" }, shown(site.path) || "(the model itself)"));
    const facts = [
      ["Layer", shown(site.layer.split(".").pop())],
      ["Channels", site.channels ?? "unknown"],
      ["Map", mapOf(site)],
      ["Fed by", site.producer ? h("span", {}, producerOf(site), " ", h("code", {}, h("bdi", {}, shown(site.producer.path)))) : "unknown"],
      ["Then", activationOf(site)],
      ["Statistics", site.trained === false ? "never updated" : site.track_running_stats ? "trained" : "none"],
    ];
    byId("site-facts").replaceChildren(...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
    const { [path]: own, ...others } = choice.sites;
    const general = wantedAt({ ...choice, sites: others }, site);
    const current = own ?? "";
    const follows = option("", current, h("b", {}, "as the others"), `${general.by === "rule" ? "its pattern says" : "every site gets"} ${shown(general.method)}`);
    const stays = option("batch", current, h("b", {}, "batch"), "stays as it is");
    const titles = new Map(known.map((one) => [one.name, one.title]));
    const rows = methods.map((name) => {
      const cell = cells?.get(name);
      const effect = effectOf(cell);
      const detail = [h("span", { class: `cell ${effect}` }, MEANS[effect]), " ", shown(cell?.method && cell.method !== name ? cell.method : titles.get(name) ?? "")];
      if (cell?.reason) detail.push(h("br"), h("span", { class: "reason" }, `${shown(cell.reason)}; ${shown(cell.fix)}`));
      for (const note of cell?.notes ?? []) detail.push(h("br"), h("span", { class: "muted" }, shown(note)));
      return option(name, current, h("b", {}, shown(name)), ...detail, effect === "refused");
    });
    const legend = h("legend", {}, "What would stand here");
    byId("site-methods").replaceChildren(legend, follows, stays, ...rows);
    dialog.returnValue = "";
    dialog.showModal();
    (dialog.querySelector("input:checked") ?? dialog.querySelector("input")).focus();
    byId("site-form").scrollTop = 0;
  };
}

function option(value, current, ...content) {
  const refused = content.at(-1) === true;
  const parts = content.filter((part) => typeof part !== "boolean");
  const box = h("input", { type: "radio", name: "method", value, checked: value === current, disabled: refused });
  return h("label", { class: `option${refused ? " refused-option" : ""}` }, box, h("span", {}, parts[0], " ", h("span", { class: "meaning" }, ...parts.slice(1))));
}
