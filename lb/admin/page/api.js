// The API of the balancer that served this page.

const PATIENCE = 8000; // ms for an answer
const CHANGE_PATIENCE = 35000; // a little more than the balancer takes
const TOKEN = "quiclb-token";

// `status` is that of HTTP, 0 if there was no answer at all.
export class ApiError extends Error {
  constructor(status, message, reasons = []) {
    super(message);
    this.status = status;
    this.reasons = reasons;
  }
}

// For as long as the tab lives, and never in an address.
export function keepToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

export const get = (path) => ask("GET", path, undefined, PATIENCE);

export const explain = (question) => ask("POST", "/v1/explain", question, PATIENCE);

// A change that is refused if anything else was changed since `generation`.
export function changeBackend(service, backend, change, generation) {
  const path = `/v1/services/${encodeURIComponent(service)}/backends/${encodeURIComponent(backend)}`;
  return ask("PATCH", path, change, CHANGE_PATIENCE, { "If-Match": `"${generation}"` });
}

async function ask(method, path, body, patience, headers = {}) {
  const options = { method, headers: { ...headers }, cache: "no-store", signal: AbortSignal.timeout(patience) };
  const token = sessionStorage.getItem(TOKEN);
  if (token) {
    options.headers.Authorization = `Bearer ${token}`;
    options.credentials = "omit"; // so that the browser does not ask for another one by itself
  }
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  let answer;
  try {
    response = await fetch(path, options);
    answer = await response.json();
  } catch (error) {
    if (response !== undefined && !response.ok) throw new ApiError(response.status, `HTTP status ${response.status}`);
    throw new ApiError(0, error.name === "TimeoutError" ? "no answer in time" : "no answer");
  }
  if (response.status === 401 && token === sessionStorage.getItem(TOKEN)) sessionStorage.removeItem(TOKEN);
  if (response.ok) return answer;
  throw new ApiError(response.status, answer.error ?? `HTTP status ${response.status}`, answer.reasons);
}
