// Samples of the pool's use, the oldest first, and what is read off them.
const KEPT = 3600; // seconds

export class History {
  constructor() {
    this.time = [];
    this.use = [];
    this.seconds = 2;
  }

  get last() {
    return this.time.at(-1) ?? 0;
  }

  // Several processes may answer in turn, each with samples of its own: none may go back in time.
  add({ time, pool_use: use, seconds }) {
    this.seconds = seconds;
    for (let i = 0; i < time.length; i += 1) {
      if (time[i] <= this.last) continue;
      this.time.push(time[i]);
      this.use.push(use[i]);
    }
    const old = this.time.findIndex((t) => t > this.last - KEPT);
    this.time.splice(0, old);
    this.use.splice(0, old);
  }

  // Where no samples were taken the curve has a gap, not a straight line.
  within(range) {
    const time = [];
    const use = [];
    const from = this.last - range;
    for (let i = 0; i < this.time.length; i += 1) {
      if (this.time[i] < from) continue;
      if (time.length && this.time[i] - time.at(-1) > 5 * this.seconds) {
        time.push(time.at(-1) + this.seconds);
        use.push(null);
      }
      time.push(this.time[i]);
      use.push(this.use[i]);
    }
    return { time, use };
  }
}

// The highest use in each of so many equal spans; spans without a sample are left out.
export function peaks({ time, use }, spans) {
  if (!time.length) return [];
  const width = (time.at(-1) - time[0]) / spans || 1;
  const found = new Map();
  for (let i = 0; i < time.length; i += 1) {
    if (use[i] === null) continue;
    const span = Math.min(spans - 1, Math.floor((time[i] - time[0]) / width));
    const until = Math.min(time.at(-1), time[0] + (span + 1) * width);
    found.set(span, { until, use: Math.max(use[i], found.get(span)?.use ?? 0) });
  }
  return [...found.values()];
}
