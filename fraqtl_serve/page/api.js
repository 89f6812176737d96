// Talks to the server beside which this page lies. Addresses are relative: a proxy may have put a prefix before them.
const STORED = `fraqtl-key ${location.pathname}`; // other servers may be other paths of the same host
const PATIENCE = 10_000;

export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let key = "";
try {
  key = sessionStorage.getItem(STORED) ?? "";
} catch {} // storage can be forbidden: the key is kept as long as the page then

export const hasKey = () => key !== "";

export function setKey(value) {
  key = value;
  try {
    if (value) sessionStorage.setItem(STORED, value);
    else sessionStorage.removeItem(STORED);
  } catch {}
}

export async function get(path) {
  let headers;
  try {
    headers = new Headers(key ? { Authorization: `Bearer ${key}` } : {});
  } catch {
    throw new Refusal(401, "no header can carry this key"); // it has characters that HTTP doesn't know
  }
  let response;
  try {
    response = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
  } catch (error) {
    const late = error.name === "TimeoutError";
    throw new Refusal(0, late ? "The server takes more than 10 s to answer." : "The server can't be reached.");
  }
  if (response.ok) return response.json();
  const said = await response.json().catch(() => null);
  throw new Refusal(response.status, said?.error?.message ?? `The server answers with status ${response.status}.`);
}
