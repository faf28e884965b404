// What this tab remembers over a reload: what was chosen for each model.

const PREFIX = "normsearch.model.";

export function remembered(model) {
  try {
    return JSON.parse(sessionStorage.getItem(PREFIX + model)) ?? {};
  } catch {
    return {};
  }
}

export function remember(model, changes) {
  sessionStorage.setItem(PREFIX + model, JSON.stringify({ ...remembered(model), ...changes }));
}
