// Figures as people read them. All numbers are in the page's language, whatever the browser's.
const LANGUAGE = "en-GB";
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
const SPACE = "\u00a0"; // a number stays on one line with its unit

const whole = new Intl.NumberFormat(LANGUAGE, { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat(LANGUAGE, { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export const NONE = "\u2013";

export const count = (value) => (value == null ? NONE : whole.format(value));

export const decimal = (value, digits = 1) =>
  new Intl.NumberFormat(LANGUAGE, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);

// Three figures: 512 B, 8.50 KiB, 12.4 MiB, 256 MiB.
export function bytes(value) {
  if (value == null) return NONE;
  let unit = 0;
  // What would be rounded to 1,024 of a unit is 1 of the next.
  while (value >= 1023.5 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return decimal(value, digits) + SPACE + UNITS[unit];
}

// The ticks of an axis are round numbers: no digits that say nothing.
export function shortBytes(value) {
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${Number(value.toFixed(1))}${SPACE}${UNITS[unit]}`;
}

export const percent = (share) => (share == null ? NONE : `${decimal(100 * share)}${SPACE}%`);

export const times = (ratio) => `${decimal(ratio, 2)}${SPACE}×`;

export const time = (seconds) => clock.format(new Date(1000 * seconds));
