// A field that suggests as one types: the ARIA combobox with a list.

import { h, settled, shown } from "./dom.js";

/**
 * @param input the field
 * @param list the list that it controls
 * @param search returns what matches a text, or throws
 * @param onTake is told what was taken
 */
export function combobox(input, list, search, onTake) {
  let active = -1;
  let asked = 0;

  const options = () => [...list.querySelectorAll("[role=option]")];
  const close = () => {
    asked += 1;
    list.hidden = true;
    active = -1;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  };
  const mark = (place) => {
    const found = options();
    if (!found.length) return;
    active = (place + found.length) % found.length;
    found.forEach((one, number) => one.setAttribute("aria-selected", String(number === active)));
    input.setAttribute("aria-activedescendant", found[active].id);
    found[active].scrollIntoView({ block: "nearest" });
  };
  const take = (option) => {
    input.value = option.dataset.value;
    close();
    onTake(input.value);
  };
  const open = (items, text) => {
    const lines = items.map((name, number) =>
      h("li", { role: "option", id: `${list.id}-${number}`, "aria-selected": "false", "data-value": name }, ...marked(name, text)));
    if (!lines.length) lines.push(h("li", { class: "none", role: "presentation" }, "Nothing has such a name"));
    list.replaceChildren(...lines);
    active = -1;
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    input.removeAttribute("aria-activedescendant");
  };
  const look = async () => {
    // What was typed may be acted on only after the field was left.
    if (document.activeElement !== input) return;
    const text = input.value.trim();
    const mine = (asked += 1);
    if (list.hidden) {
      list.replaceChildren(h("li", { class: "none", role: "presentation" }, "Looking…"));
      list.hidden = false;
      input.setAttribute("aria-expanded", "true");
    }
    try {
      const items = await search(text);
      if (mine === asked) open(items, text);
    } catch (error) {
      if (mine === asked) list.replaceChildren(h("li", { class: "none", role: "presentation" }, error.message));
    }
  };
  const lookSoon = settled(150, look);

  input.addEventListener("input", lookSoon);
  input.addEventListener("focus", () => input.value || look());
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) look();
      else mark(active + (event.key === "ArrowDown" ? 1 : active < 0 ? 0 : -1));
    } else if (event.key === "Enter" && !list.hidden && active >= 0) {
      event.preventDefault();
      take(options()[active]);
    } else if (event.key === "Escape" && !list.hidden) {
      event.preventDefault();
      close();
    }
  });
  // Before the field loses the focus, which closes the list.
  list.addEventListener("mousedown", (event) => {
    event.preventDefault();
    const option = event.target.closest("[role=option]");
    if (option) take(option);
  });
}

function marked(name, text) {
  const place = text ? name.toLowerCase().indexOf(text.toLowerCase()) : -1;
  if (place < 0) return [shown(name)];
  const end = place + text.length;
  return [shown(name.slice(0, place)), h("mark", {}, shown(name.slice(place, end))), shown(name.slice(end))];
}
