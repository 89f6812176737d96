// The table of recent requests. Whatever a client may have chosen, ids above all, is set as text, never as markup.
import { bytes, count, NONE, percent, time } from "./format.js";

const KEPT = 256;

export class Requests {
  constructor(body, sum) {
    this.body = body;
    this.sum = sum;
    this.records = new Map(); // by id: with several API servers each answers with its own
    this.shown = "";
  }

  add(records) {
    for (const record of records) this.records.set(record.id, record);
    const newest = [...this.records.values()].sort((a, b) => b.time - a.time).slice(0, KEPT);
    this.records = new Map(newest.map((record) => [record.id, record]));
  }

  clear() {
    this.records.clear();
    this.shown = "";
    this.body.replaceChildren();
    this.sum.textContent = "";
  }

  show(limit, dtype) {
    const records = [...this.records.values()].slice(0, limit);
    const shown = JSON.stringify([dtype, records.map((record) => [record.id, record.time])]);
    if (shown === this.shown) return; // a text that is selected stays so
    this.shown = shown;
    this.body.replaceChildren(...(records.length ? records.map((record) => row(record, dtype)) : [emptyRow()]));
    this.sum.textContent = summary(records, dtype);
  }
}

function summary(records, dtype) {
  const reports = records.flatMap((record) => record.report ?? []);
  if (!reports.length) return "";
  const total = (name) => reports.reduce((sum, report) => sum + report[name], 0);
  const [who, they] = reports.length === 1 ? ["This one", "it"] : [`These ${count(reports.length)}`, "they"];
  const [held, plain] = [bytes(total("bytes")), bytes(total("baseline_bytes"))];
  return `${who} held ${held} when ${they} ended; in ${dtype} it would have been ${plain}. Cached blocks count in each.`;
}

function row(record, dtype) {
  const report = record.report;
  const line = element("tr", { role: "row" });
  const share = report?.baseline_bytes ? report.saved_bytes / report.baseline_bytes : null;
  const shared = report?.shared_blocks ? `, ${count(report.shared_blocks)} cached` : "";
  line.append(
    cell("Ended", element("time", { dateTime: new Date(1000 * record.time).toISOString() }, time(record.time))),
    requestCell(record),
    cell("Tokens", figure(report?.tokens, count)),
    cell("Blocks", figure(report?.blocks, count), shared),
    cell("Held", figure(report?.bytes, bytes)),
    cell(`In ${dtype}`, figure(report?.baseline_bytes, bytes)),
    cell("Saved", figure(report?.saved_bytes, bytes), share === null ? "" : `, ${percent(share)}`),
  );
  return line;
}

function requestCell(record) {
  const where = element("span", { className: "endpoint" }, record.endpoint);
  if (record.status === "aborted") where.append(" ", element("span", { className: "tag" }, "aborted"));
  const found = cell("Request", where, " ", element("span", { className: "id" }, record.id));
  found.className = "request";
  return found;
}

function emptyRow() {
  const line = element("tr", { role: "row" });
  const only = cell("", "No request has ended yet.");
  only.colSpan = 7;
  only.className = "empty";
  line.append(only);
  return line;
}

const figure = (value, format) =>
  value == null ? NONE : element("data", { value: String(value) }, format(value));

function cell(label, ...content) {
  const found = element("td", { role: "cell", className: "number" });
  found.dataset.label = label;
  if (label === "Ended") found.className = "ended";
  found.append(...content);
  return found;
}

function element(name, properties = {}, text = null) {
  const { role, ...rest } = properties;
  const made = Object.assign(document.createElement(name), rest);
  if (role) made.setAttribute("role", role);
  if (text !== null) made.textContent = text;
  return made;
}
