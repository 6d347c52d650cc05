// A task's colour is its name's: the same on every page, every server and every day.
// Colour never stands alone; wherever it is used, the name is beside it or one keystroke away.

const HUES = 24;
const SEED = 41812;  // of the hash: one that keeps the tasks of the demo well apart

export function hue(task) {
  let hash = SEED;
  for (const byte of new TextEncoder().encode(task)) {
    hash = Math.imul(hash ^ byte, 16777619);
  }
  hash ^= hash >>> 15;
  hash = Math.imul(hash, 0x2c1b3c6d);
  hash ^= hash >>> 13;
  return ((hash >>> 0) % HUES) * (360 / HUES);
}

// Custom properties for CSS; the base model has no task and no colour.
export function taskVars(task) {
  return task ? { hue: hue(task), chroma: 1 } : { hue: 0, chroma: 0 };
}

export const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;

export function fill(task) {
  const chroma = task ? (isDark() ? 0.12 : 0.135) : 0;
  return `oklch(${isDark() ? 0.74 : 0.62} ${chroma} ${task ? hue(task) : 0})`;
}
