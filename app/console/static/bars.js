// Shares as bars, and how much of the model's own probability stands behind them.

import { h, percent } from "./dom.js";

const LOW = 0.5;

// Only what is 0 or 1 is called so.
export function likely(share) {
  if (share > 0 && share < 0.001) return "<0.1%";
  if (share < 1 && share > 0.999) return ">99.9%";
  return percent(share);
}

// `rows`: label, share, and what is said of it; `kind` is a class of its own, such as "best".
export function bars(rows, label) {
  return h("ul", { class: "bars", "aria-label": label }, rows.map((row) => bar("li", row)));
}

function bar(tag, { label, share, said = likely(share), kind }) {
  return h(tag, { class: `measure ${kind || ""}`.trim(), vars: { share } }, h("span", { class: "label" }, label), h("span", { class: "bar", "aria-hidden": "true" }, h("i")), h("span", { class: "share" }, said));
}

// The probability that the model says any of the labels at all.
export function labelMass(mass) {
  const isLow = mass < LOW;
  const words = isLow ? "Low: the model wanted to say something else than any of these." : "How probably the model says any of these by itself.";
  return h("div", { class: `mass${isLow ? " low" : ""}` }, bar("p", { label: "Label mass", share: mass }), h("small", {}, words));
}
