// The page: asks the server every two seconds, shows what it says, and says so when it says nothing.
import { get, hasKey, Refusal, setKey } from "./api.js";
import { Chart, describe } from "./chart.js";
import { bytes, count, decimal, percent, time, times } from "./format.js";
import { History, peaks } from "./history.js";
import { Requests } from "./requests.js";

const EVERY = 2000; // milliseconds
const LONGEST = 15_000;
const SPANS = 10;

const at = (id) => document.getElementById(id);
const model = { capacity: null, name: "", history: new History(), seen: 0 };
const requests = new Requests(at("rows"), at("requests-sum"));
const chart = new Chart(at("chart"), showCursor);
let curve = { time: [], packed: [], plain: [], limit: 0 };
let timer = 0;
let failures = 0;
let paused = false;
let asking = false;

const range = () => Number(document.querySelector("input[name=range]:checked").value);
const limit = () => Number(at("limit").value);

// --- asking -----------------------------------------------------------------------------------------------

async function ask() {
  clearTimeout(timer);
  if (asking) return;
  asking = true;
  try {
    const [capacity, history, recent] = await Promise.all([
      get("capacity"),
      get(`history?since=${model.history.last}`),
      get(`requests?limit=${limit()}`),
    ]);
    if (!model.name || failures) model.name = await nameOfModel();
    model.capacity = capacity;
    model.seen = Date.now() / 1000;
    model.history.add(history);
    requests.add(recent.requests);
    failures = 0;
    setState(paused ? "paused" : "live");
    showAll();
  } catch (error) {
    fail(error);
  } finally {
    asking = false;
  }
  plan();
}

function plan() {
  clearTimeout(timer);
  const state = document.body.dataset.state;
  if (paused || document.hidden || state === "locked") return;
  timer = setTimeout(ask, state === "lost" ? Math.min(LONGEST, EVERY * 2 ** (failures - 1)) : EVERY);
}

async function nameOfModel() {
  try {
    const { data } = await get("../../v1/models");
    return data[0]?.id ?? "";
  } catch {
    return model.name; // the rest of the page can do without
  }
}

function fail(error) {
  if (!(error instanceof Refusal)) throw error;
  if (error.status === 401) {
    lock();
    return;
  }
  failures += 1;
  const when = model.seen ? ` The figures below are those of ${time(model.seen)}.` : "";
  const what = error.status === 503 ? `The engine isn't ready: ${error.message}.` : error.message;
  const text = `${what}${when}`;
  // An alert is read out whenever its text is set: once is enough.
  if (at("notice-text").textContent !== text) at("notice-text").textContent = text;
  setState("lost");
}

// --- states -----------------------------------------------------------------------------------------------

const SAID = { live: "Live", paused: "Paused", lost: "No answer", locked: "Locked" };

function setState(state) {
  if (document.body.dataset.state === state) return;
  document.body.dataset.state = state;
  at("state").textContent = SAID[state];
  at("notice").hidden = state !== "lost";
  if (state !== "lost") at("notice-text").textContent = "";
  at("key-form").hidden = state !== "locked";
  at("figures").hidden = state === "locked" || !model.capacity;
  at("pause").hidden = state === "locked" || !model.capacity;
  at("forget").hidden = !hasKey();
}

// The server wants a key, or another one. Nothing that was shown stays.
function lock() {
  at("key-error").textContent = hasKey() ? "The server refuses this key." : "";
  setKey("");
  Object.assign(model, { capacity: null, name: "", history: new History(), seen: 0 });
  requests.clear();
  for (const shown of document.querySelectorAll("#figures data")) clear(shown);
  at("chart-rows").replaceChildren();
  at("subject").textContent = "fraqtl-serve";
  document.title = "KV memory · fraqtl-serve";
  curve = { time: [], packed: [], plain: [], limit: 0 };
  chart.show(curve, range());
  setState("locked");
  at("key").focus();
}

// --- showing ----------------------------------------------------------------------------------------------

function put(id, value, format) {
  const found = at(id);
  const text = format(value);
  if (found.textContent === text && found.value === String(value)) return;
  found.value = value ?? "";
  found.textContent = text;
}

function clear(shown) {
  shown.value = "";
  shown.textContent = "";
}

function showAll() {
  const said = model.capacity;
  at("figures").hidden = false;
  at("pause").hidden = false;
  for (const found of document.querySelectorAll(".dtype")) found.textContent = said.baseline_dtype;
  for (const found of document.querySelectorAll(".format")) found.textContent = said.kv_format;
  const subject = `${said.kv_format}, blocks of ${count(said.block_size)} tokens`;
  at("subject").textContent = model.name ? `${model.name} in ${subject}` : subject;
  if (model.name) document.title = `${model.name} · KV memory`;
  showCapacity(said);
  showLoad(said);
  showCurve();
  requests.show(limit(), said.baseline_dtype);
}

function showCapacity(said) {
  put("tokens", said.tokens, count);
  put("baseline-tokens", said.baseline_tokens, count);
  put("ratio", said.ratio, times);
  put("max-model-len", said.max_model_len, count);
  put("concurrency", said.concurrency, (value) => decimal(value, 1));
  put("baseline-concurrency", said.baseline_concurrency, (value) => decimal(value, 1));
  at("tokens-bar").style.width = `${(100 * said.baseline_tokens) / said.tokens}%`;
  at("concurrency-bar").style.width = `${(100 * said.baseline_concurrency) / said.concurrency}%`;
}

// Bytes of a block in the model's own dtype. Those of a hybrid model hold other numbers of tokens there, and states:
// then what the same sequences would take.
function plainBlock(said) {
  return said.state_bytes ? Math.round((said.block_bytes * said.tokens) / said.baseline_tokens) : said.baseline_block_bytes;
}

function showLoad(said) {
  const blocks = said.pool_use == null ? null : Math.round(said.pool_use * said.blocks);
  put("used", blocks == null ? null : blocks * said.block_bytes, bytes);
  put("baseline-used", blocks == null ? null : blocks * plainBlock(said), bytes);
  put("use", said.pool_use, percent);
  put("pool", said.pool_bytes, bytes);
  put("running", said.running, count);
  put("waiting", said.waiting, count);
  at("used-bar").style.width = `${100 * (said.pool_use ?? 0)}%`;
}

function showCurve() {
  const said = model.capacity;
  const { time: when, use } = model.history.within(range());
  const of = (size) => use.map((share) => (share === null ? null : Math.round(share * said.blocks) * size));
  curve = { time: when, packed: of(said.block_bytes), plain: of(plainBlock(said)), limit: said.pool_bytes };
  chart.show(curve, range());
  showCursor(null);
  const unknown = said.pool_use == null ? "This server keeps no metrics (--disable-log-stats), so no curve." : "";
  const text = unknown || describe(curve, said.baseline_dtype);
  at("chart-caption").textContent = text;
  at("chart").setAttribute("aria-label", `Pool use over time. ${text}`);
  if (at("chart-details").open) showCurveAsTable();
}

function showCurveAsTable() {
  const said = model.capacity;
  const rows = peaks(model.history.within(range()), SPANS).map(({ until, use }) => {
    const blocks = Math.round(use * said.blocks);
    const row = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = time(until);
    row.append(head);
    for (const text of [bytes(blocks * said.block_bytes), bytes(blocks * plainBlock(said)), percent(use)]) {
      const cell = document.createElement("td");
      cell.className = "number";
      cell.textContent = text;
      row.append(cell);
    }
    return row;
  });
  at("chart-rows").replaceChildren(...rows);
}

// The legend gives the figures under the pointer, else the newest.
function showCursor(index) {
  const shown = index ?? curve.time.length - 1;
  put("key-packed", curve.packed[shown] ?? null, bytes);
  put("key-plain", curve.plain[shown] ?? null, bytes);
  put("key-pool", curve.limit || null, bytes);
  at("key-time").textContent = index == null ? "" : `at ${time(curve.time[shown])}`;
}

// --- what people do ---------------------------------------------------------------------------------------

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(at("key").value.trim());
  at("key").value = "";
  at("key-error").textContent = "";
  ask().then(() => model.capacity && at("main").focus({ preventScroll: true }));
});
at("forget").addEventListener("click", () => {
  setKey("");
  lock();
});
at("pause").addEventListener("click", () => {
  paused = !paused;
  at("pause").textContent = paused ? "Go on" : "Pause";
  if (document.body.dataset.state !== "lost") setState(paused ? "paused" : "live");
  if (paused) clearTimeout(timer);
  else ask();
});
at("retry").addEventListener("click", ask);
at("limit").addEventListener("change", ask);
at("chart-details").addEventListener("toggle", () => model.capacity && showCurveAsTable());
for (const input of document.querySelectorAll("input[name=range]")) {
  input.addEventListener("change", () => model.capacity && showCurve());
}
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : paused || ask()));

ask();
