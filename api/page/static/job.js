// A job: how far it has come, live; then what it came to.

import { follow, get, post } from "./api.js";
import { announce, byId, duration, h, percent, show, shown, tell, when } from "./dom.js";
import { KINDS, UNFINISHED } from "./joblist.js";
import { resultPart } from "./result.js";

const MOST_LINES = 400;
let job = null;

export function jobView() {
  const result = resultPart();
  byId("cancel-job").addEventListener("click", async () => {
    const button = byId("cancel-job");
    button.disabled = true;
    button.textContent = "Cancelling…";
    try {
      await post(`/v1/jobs/${job.id}/cancel`, {});
    } catch (error) {
      // It may have ended in the same moment, which the events tell.
      if (error.status !== 409) tell(byId("job-error"), error);
      button.disabled = false;
    }
    button.textContent = "Cancel";
  });

  return async (identifier, signal) => {
    job = await get(`/v1/jobs/${identifier}`, { signal });
    byId("h-job").replaceChildren(`${KINDS[job.kind] ?? job.kind} of `, job.model ? h("a", { href: `#/models/${job.model}` }, h("bdi", {}, shown(job.name))) : h("bdi", {}, shown(job.name)));
    byId("job-log").replaceChildren();
    byId("cancel-job").disabled = false;
    result.clear();
    tell(byId("job-error"), null);
    draw();
    if (job.state === "succeeded") await result.draw(job, signal);
    follow(identifier, (name, data, number) => {
      if (signal.aborted || job.id !== identifier) return "end";
      return take(name, data, number, signal, result);
    }, signal).catch((error) => !signal.aborted && error.status !== 401 && tell(byId("job-error"), error));
    return `${KINDS[job.kind] ?? job.kind} of ${shown(job.name)}`;
  };
}

function take(name, data, number, signal, result) {
  line(name, data);
  const isOver = !UNFINISHED.includes(job.state);
  if (name === "progress" && !isOver) job = { ...job, state: "running", progress: data, seconds_left: data.seconds_left };
  else if (name === "started" && !isOver) job = { ...job, state: "running", attempts: data.attempt, progress: null, started: job.started ?? new Date().toISOString() };
  if (["succeeded", "failed", "cancelled"].includes(name)) {
    if (!isOver) ended(signal, result);
    return "end";
  }
  draw();
  return "";
}

async function ended(signal, result) {
  try {
    job = await get(`/v1/jobs/${job.id}`, { signal });
    draw();
    announce(`The ${(KINDS[job.kind] ?? job.kind).toLowerCase()} ${{ succeeded: "is done", failed: "failed", cancelled: "was cancelled" }[job.state]}`);
    if (job.state === "succeeded") await result.draw(job, signal);
  } catch (error) {
    if (!signal.aborted && error.status !== 401) tell(byId("job-error"), error);
  }
}

function line(name, data) {
  const texts = {
    queued: () => "Waits for a worker",
    started: () => {
      // A worker that ends in good order gives its jobs back, and no attempt is counted.
      const again = [...byId("job-log").children].some((one) => one.textContent.startsWith("Begun"));
      if (data.attempt > 1) return `Begun again, attempt ${data.attempt}: the worker before was lost`;
      return again ? "Begun again: the worker before has ended" : "Begun";
    },
    progress: () => (data.done >= data.total && data.total ? `${shown(data.stage)}: ${data.total} of ${data.total}${data.detail ? `, ${shown(data.detail)}` : ""}` : null),
    log: () => shown(data.text),
    succeeded: () => "Done",
    failed: () => "Failed",
    cancelled: () => "Cancelled; nothing of it was kept",
  };
  const text = texts[name]?.();
  if (!text) return;
  const log = byId("job-log");
  if (log.lastElementChild?.textContent === text) return;
  log.append(h("li", {}, text));
  if (log.children.length > MOST_LINES) log.firstElementChild.remove();
}

function draw() {
  const mark = byId("job-state");
  mark.className = `state ${job.state}`;
  mark.textContent = job.state;
  const parts = [];
  if (job.finished && job.started) parts.push(`took ${duration((new Date(job.finished) - new Date(job.started)) / 1000)}, ended `, when(job.finished));
  else if (job.finished) parts.push("ended ", when(job.finished));
  else if (job.started) parts.push("since ", when(job.started));
  else parts.push("asked for ", when(job.created));
  byId("job-when").replaceChildren(...parts);
  const isGoing = UNFINISHED.includes(job.state);
  show(byId("job-progress-part"), isGoing);
  if (isGoing) drawProgress();
  if (job.state === "failed") tell(byId("job-error"), { problem: job.problem });
}

function drawProgress() {
  const [bar, step] = [byId("job-bar"), job.progress];
  const known = job.state === "running" && step && step.total > 0;
  byId("job-stage").textContent = job.state === "queued" ? "Waiting for a worker" : step ? shown(step.stage) : "Beginning";
  if (known) bar.value = step.done / step.total;
  else bar.removeAttribute("value");
  byId("job-count").textContent = known ? `${step.done} of ${step.total} (${percent(step.done / step.total).replace(/\.\d/, "")})${step.detail ? `: ${shown(step.detail)}` : ""}` : "";
  byId("job-eta").textContent = known && job.seconds_left !== null && job.seconds_left !== undefined ? `· ${duration(job.seconds_left)} left of this stage` : "";
}
