// What is chosen for a model's sites, and what comes of it by the table of choices that the service made.

export const KEEP = "batch";

/**
 * A choice: a method for all sites, exceptions by pattern, exceptions for single sites.
 * `rules` are {pattern, method}; the first that matches counts, `*` last. `sites` maps paths to methods.
 */
export const empty = () => ({ all: KEEP, rules: [], sites: {} });

/** Return the methods of a text: one, or several in order of preference. */
export function preferences(text) {
  const parts = text.match(/[^,(]+(\([^)]*\))?/g) ?? [];
  return parts.map((part) => part.trim()).filter(Boolean);
}

const asked = (text) => {
  const found = preferences(text);
  return found.length === 1 ? found[0] : found;
};

/** Return a pattern that matches a path alone. */
const literally = (path) => path.replace(/[[*?]/g, "[$&]");

/** Return a pattern under which an object keeps its place: a whole number would come first. */
const ordered = (pattern) => pattern.replace(/^\d/, /^\d+$/.test(pattern) ? "[$&]" : "$&");

/** Return a choice as `to` of a request: a method, or patterns of paths to methods. */
export function to(choice) {
  const singles = Object.entries(choice.sites);
  if (!choice.rules.length && !singles.length) return asked(choice.all);
  const patterns = {};
  const put = (pattern, text) => (patterns[pattern] ??= asked(text));
  for (const [path, method] of singles) put(literally(path), method);
  for (const { pattern, method } of choice.rules) put(ordered(pattern), method);
  if (!("*" in patterns) && choice.all !== KEEP) patterns["*"] = asked(choice.all);
  return patterns;
}

const compiled = new Map();

/** Whether a pattern matches a path, as Python's fnmatchcase does it. */
export function matches(pattern, path) {
  if (!compiled.has(pattern)) compiled.set(pattern, new RegExp(`^${translated(pattern)}$`, "s"));
  return compiled.get(pattern).test(path);
}

function translated(pattern) {
  let made = "";
  for (let place = 0; place < pattern.length; place += 1) {
    const one = pattern[place];
    const end = one === "[" ? pattern.indexOf("]", place + 2) : -1;
    if (one === "*") made += ".*";
    else if (one === "?") made += ".";
    else if (end > 0) {
      const inside = pattern.slice(place + 1, end).replace(/\\/g, "\\\\").replace(/[[\]]/g, "\\$&").replace(/^!/, "^");
      made += `[${inside}]`;
      place = end;
    } else made += one.replace(/[\\^$.|+(){}[\]]/g, "\\$&");
  }
  return made;
}

/** Return what is asked for at a site: the method, and which part of the choice says so. */
export function wantedAt(choice, site) {
  const names = [site.path, ...site.aliases];
  for (const name of names) if (name in choice.sites) return { method: choice.sites[name], by: "site" };
  const fits = ({ pattern }) => names.some((name) => matches(pattern, name));
  const everything = choice.rules.find(({ pattern }) => pattern === "*");
  const rule = choice.rules.find((one) => one.pattern !== "*" && fits(one)) ?? everything;
  if (rule) return { method: rule.method, by: "rule" };
  return { method: choice.all, by: "all" };
}

/**
 * Return what will stand at a site: {method, effect, cell, by, wanted}; effect is kept, exact, approx, refused,
 * or unknown where the service has not been asked about this spelling yet.
 */
export function decided(choice, site, cells) {
  const { method: text, by } = wantedAt(choice, site);
  let last = null;
  for (const method of preferences(text)) {
    if (method === KEEP) return { method, effect: "kept", cell: null, by, wanted: text };
    const cell = cells?.get(method);
    if (!cell) return { method, effect: "unknown", cell: null, by, wanted: text };
    if (cell.method !== null) return { method, effect: cell.exact ? "exact" : "approx", cell, by, wanted: text };
    last = { method, effect: "refused", cell, by, wanted: text };
  }
  return last ?? { method: KEEP, effect: "kept", cell: null, by, wanted: text };
}

/** Return every spelling that a choice names. */
export function spellings(choice) {
  const texts = [choice.all, ...choice.rules.map((rule) => rule.method), ...Object.values(choice.sites)];
  return [...new Set(texts.flatMap(preferences))].filter((method) => method !== KEEP);
}

/** Return a pattern for each group of sites: "layer1.*" for what is below layer1, if there are several. */
export function groups(sites) {
  const counts = new Map();
  for (const { path } of sites) {
    const parts = path.split(".");
    for (let depth = 1; depth < parts.length; depth += 1) {
      const prefix = parts.slice(0, depth).join(".");
      counts.set(prefix, (counts.get(prefix) ?? 0) + 1);
    }
  }
  return [...counts].filter(([, number]) => number > 1 && number < sites.length).map(([prefix]) => `${prefix}.*`);
}
