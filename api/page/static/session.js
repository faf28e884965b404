// What this browser remembers of each model: what was chosen for it, also in another tab or after a restart.

const PREFIX = "normsearch.model.";
const MOST = 50;

export function remembered(model) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + model)) ?? {};
  } catch {
    return {};
  }
}

export function remember(model, changes) {
  const others = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX) && name !== PREFIX + model);
  // Ids sort by time: the oldest models are forgotten first.
  for (const old of others.sort().slice(0, Math.max(0, others.length + 1 - MOST))) localStorage.removeItem(old);
  localStorage.setItem(PREFIX + model, JSON.stringify({ ...remembered(model), ...changes }));
}
