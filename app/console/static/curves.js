// Curves over the steps of a training run, by uPlot: the loss, and the scores on the dev examples.

import { h } from "./dom.js";
import { Frame, axis, css } from "./plots.js";

const COLOURS = ["--accent", "--warm", "--good", "--muted"];
const DASHES = [undefined, [6, 4], [2, 3], [10, 3, 2, 3]];

const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000];  // steps between two marks

const isLoss = (name) => name === "loss" || name === "dev loss";
const short = (value) => Number(value.toPrecision(3)).toString();

// `curves`: {name: {steps, values}}. Elements for the losses and for the scores; `close` when they go.
export class Curves {
  constructor() {
    this.element = h("div", { class: "pair curves" });
    this.charts = [];
  }

  draw(curves) {
    const names = Object.keys(curves).filter((name) => curves[name].steps.length);
    const groups = [["Loss", names.filter(isLoss)], ["Score on the dev examples", names.filter((name) => !isLoss(name))]].filter(([, group]) => group.length);
    const drawn = this.charts.map((chart) => chart.names.join());
    if (drawn.join("|") !== groups.map(([, group]) => group.join()).join("|")) {
      this.close();
      this.charts = groups.map(([title, group]) => new Chart(title, group));
      this.element.replaceChildren(...this.charts.map((chart) => chart.element));
    }
    for (const chart of this.charts) chart.draw(curves);
  }

  close() {
    for (const chart of this.charts) chart.close();
    this.charts = [];
  }
}

class Chart {
  constructor(title, names) {
    this.names = names;
    this.plotBox = h("div", { class: "plot", role: "img", "aria-label": title });
    const legend = h("span", { class: "legend" }, names.map((name, index) => h("span", {}, h("i", { class: `line curve-${index % COLOURS.length}`, "aria-hidden": "true" }), name.replace(/^dev (?!loss)/, ""))));
    this.title = title;
    this.element = h("figure", {}, h("figcaption", {}, h("h3", {}, title), legend), this.plotBox);
  }

  // One x axis for all: uPlot wants a column per line, with gaps where a line has no value.
  draw(curves) {
    const steps = [...new Set(this.names.flatMap((name) => curves[name].steps))].sort((one, other) => one - other);
    const data = [steps, ...this.names.map((name) => {
      const values = new Map(curves[name].steps.map((step, index) => [step, curves[name].values[index]]));
      return steps.map((step) => values.get(step) ?? null);
    })];
    this.plotBox.setAttribute("aria-label", this.inWords(curves));
    if (this.frame) this.frame.setData(data);
    else if (this.plotBox.isConnected) this.begin(data);
  }

  inWords(curves) {
    return `${this.title}: ${this.names.map((name) => {
      const { steps, values } = curves[name];
      return `${name} ${short(values[0])} at step ${steps[0]}, ${short(values.at(-1))} at step ${steps.at(-1)}`;
    }).join("; ")}`;
  }

  begin(data) {
    this.frame = new Frame(this.plotBox, {
      height: 200,
      padding: [8, 16, 0, 0],
      scales: { x: { time: false }, y: { range: (_, low, high) => [Math.min(0, low ?? 0), Math.max((high ?? 0) * 1.08, 1e-6)] } },
      axes: [{ ...axis(), size: 26, space: 60, incrs: WHOLE }, { ...axis(), size: 48 }],
      series: [{}, ...this.names.map((name, index) => ({
        label: name,
        stroke: () => css(COLOURS[index % COLOURS.length]),
        dash: DASHES[index % DASHES.length],
        width: 2,
        points: { show: data[0].length < 40 },
        spanGaps: true,
      }))],
    }, data);
  }

  close() {
    this.frame?.close();
  }
}

// How a version was trained, from its provenance; null where that says nothing.
export function trainingFacts({ training, metrics }) {
  const measured = Object.entries(metrics ?? {}).map(([name, value]) => `${name} ${short(value)}`).join(", ");
  if (!training) return measured ? h("p", {}, measured) : null;
  const facts = {
    Method: training.method,
    Measured: measured || null,
    Examples: Object.entries(training.num_examples ?? {}).map(([name, count]) => `${count} ${name}`).join(", ") || null,
    Steps: training.steps === undefined ? null : `${training.steps}, the best after ${training.best_step}`,
    Settings: Object.entries(training.settings ?? {}).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`).join(", ") || null,
    Data: training.data_sha256 ? h("code", {}, `sha256:${training.data_sha256}`) : null,
  };
  const curves = new Curves();
  const box = h("details", { class: "trained", ontoggle: () => box.open ? curves.draw(training.curves ?? {}) : curves.close() },
    h("summary", {}, measured || training.method),
    h("dl", { class: "facts small" }, Object.entries(facts).filter(([, value]) => value).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    curves.element);
  return box;
}
