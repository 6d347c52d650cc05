// The server's HTTP API: JSON calls, event streams, and the key that goes with them.

const STORED = "promptplex-key";
let onRefused = () => {};

export class ApiError extends Error {
  constructor(status, body) {
    super(body?.message ?? `The server answered with status ${status}.`);
    this.status = status;
    this.code = body?.code;
    this.param = body?.param;
  }
}

// Called with the error whenever the server wants a (or another) key.
export function whenKeyIsNeeded(handler) {
  onRefused = handler;
}

export function key() {
  return sessionStorage.getItem(STORED);
}

export function setKey(value) {
  if (value) sessionStorage.setItem(STORED, value);
  else sessionStorage.removeItem(STORED);
}

async function send(path, { method = "GET", body, signal, headers = {} } = {}) {
  const given = { ...headers };
  if (key()) given.authorization = `Bearer ${key()}`;
  if (body !== undefined && !(body instanceof FormData)) {
    given["content-type"] = "application/json";
    body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, { method, body, signal, headers: given, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The server doesn't answer. Is it still running?" });
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const error = new ApiError(response.status, answer?.error);
  if (response.status === 401) onRefused(error);
  throw error;
}

export async function call(path, request) {
  return (await send(path, request)).json();
}

// The data of each server-sent event, parsed. Aborting the signal ends it.
export async function* events(path, request) {
  const response = await send(path, request);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const event = JSON.parse(part.replace(/^data: /, ""));
        if (event.error) throw new ApiError(200, event.error);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export function taskPath(task, rest = "") {
  return `tasks/${encodeURIComponent(task)}${rest}`;
}

export async function allTasks() {
  const tasks = [];
  let next = null;
  do {
    const after = next ? `&after=${encodeURIComponent(next)}` : "";
    const page = await call(`tasks?limit=1000${after}`);
    tasks.push(...page.tasks);
    next = page.next;
  } while (next);
  return tasks;
}
