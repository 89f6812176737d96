// The curve of the pool's use against what the same tokens would need in the model's own dtype.
import { bytes, shortBytes, time as clock } from "./format.js";

const POWERS = Array.from({ length: 52 }, (_, power) => 2 ** power);
const FONT = "12px system-ui, sans-serif";

// Colors come from elements of the page, where the style sheet has chosen them for the theme.
const color = (selector, property = "color") => getComputedStyle(document.querySelector(selector))[property];

export class Chart {
  constructor(element, onCursor) {
    this.element = element;
    this.onCursor = onCursor;
    this.data = [[], [], [], []];
    this.range = 300;
    this.plot = null;
    new ResizeObserver(() => this.#resize()).observe(element);
    document.addEventListener("themechange", () => this.#rebuild());
  }

  // `time` in seconds, the three others in bytes; `range` in seconds.
  show({ time, packed, plain, limit }, range) {
    this.data = [time, packed, plain, time.map(() => limit)];
    this.range = range;
    if (this.plot) this.plot.setData(this.data);
    else this.#rebuild();
  }

  #size() {
    return { width: this.element.clientWidth, height: this.element.clientWidth < 600 ? 200 : 260 };
  }

  #resize() {
    const { width, height } = this.#size();
    if (this.plot && width && (width !== this.plot.width || height !== this.plot.height)) {
      this.plot.setSize({ width, height });
    }
  }

  // The pool's limit is shown when the curves come near it: a line far above would press them flat.
  #top(highest) {
    const limit = this.data[3][0] ?? 0;
    return Math.max(1.1 * highest, highest > 0.4 * limit ? 1.08 * limit : 0, 1024);
  }

  #rebuild() {
    this.plot?.destroy();
    this.plot = null;
    if (!this.data[0].length || !this.element.clientWidth) return;
    const [packed, plain, muted] = [color(".key .packed i"), color(".key .plain i"), color(".key .limit i")];
    const axis = { stroke: muted, font: FONT, ticks: { show: false }, grid: { stroke: color("#chart", "borderTopColor"), width: 1 } };
    const line = { width: 2, points: { show: false } };
    const times = (_, values, axis, space, step) => values.map((value) => clock(value).slice(0, step < 60 ? 8 : 5));
    this.plot = new uPlot(
      {
        ...this.#size(),
        padding: [8, 28, 0, 0],
        legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false }, points: { size: 7 } },
        scales: {
          x: { time: true, range: () => [this.data[0].at(-1) - this.range, this.data[0].at(-1)] },
          y: { range: () => [0, this.#top(Math.max(0, ...this.data[1], ...this.data[2]))] },
        },
        axes: [
          { ...axis, grid: { show: false }, size: 32, space: (plot) => (plot.width < 600 ? 48 : 90), values: times },
          { ...axis, size: 64, incrs: POWERS, values: (_, values) => values.map(shortBytes) },
        ],
        series: [
          {},
          { ...line, stroke: packed, fill: packed.replace("rgb(", "rgba(").replace(")", ", 0.16)") },
          { ...line, stroke: plain },
          { ...line, width: 1, stroke: muted, dash: [5, 5] },
        ],
        hooks: { setCursor: [(plot) => this.onCursor(plot.cursor.left < 0 ? null : plot.cursor.idx)] },
      },
      this.data,
      this.element,
    );
  }
}

// What the picture says, in one sentence.
export function describe({ time, packed, plain, limit }, dtype) {
  if (!time.length) return "No samples yet.";
  const highest = packed.reduce((best, value, i) => (value > (packed[best] ?? -1) ? i : best), 0);
  const peak = packed[highest] ?? 0;
  const most = plain[highest] ?? 0;
  const over = most > limit ? `, more than the pool of ${bytes(limit)} has` : "";
  return (
    `From ${clock(time[0])} to ${clock(time.at(-1))} at most ${bytes(peak)} were in use, at ${clock(time[highest])}; ` +
    `the same tokens in ${dtype} need ${bytes(most)}${over}.`
  );
}
