// Plots by uPlot: the frame of each, and lines over the last two minutes.

const SPAN = 120;  // seconds
const PER_SECOND = 4;
const LOWEST = 10;  // that the scale ends at

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");

export const axis = () => ({ stroke: () => css("--muted"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" });

// A uPlot that has the width of its container, and the colours of the scheme.
export class Frame {
  constructor(container, options, data) {
    const { height } = options;
    this.plot = new globalThis.uPlot({ width: container.clientWidth || 300, legend: { show: false }, cursor: { show: false }, ...options }, data, container);
    this.resizing = new ResizeObserver(() => this.plot.setSize({ width: container.clientWidth, height }));
    this.resizing.observe(container);
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.redraw = () => this.plot.redraw();
    this.scheme.addEventListener("change", this.redraw);
  }

  setData(data) {
    this.plot.setData(data);
  }

  close() {
    this.resizing.disconnect();
    this.scheme.removeEventListener("change", this.redraw);
    this.plot.destroy();
  }
}

export class Plot {
  // `lines`: [{label, colour: name of a custom property, dash, fill}]
  constructor(container, lines, format) {
    this.data = [[], ...lines.map(() => [])];
    this.frame = new Frame(container, {
      height: 190,
      padding: [8, 28, 0, 0],
      scales: {
        x: { time: true, range: (_, low, high) => [high - SPAN, high] },
        y: { range: (_, low, high) => [0, Math.max((high ?? 0) * 1.15, LOWEST)] },
      },
      axes: [
        { ...axis(), space: 90, size: 26, values: (_, splits) => splits.map(clock) },
        { ...axis(), size: 56, values: (_, splits) => splits.map(format) },
      ],
      series: [{}, ...lines.map((line) => ({
        label: line.label,
        stroke: () => css(line.colour),
        fill: line.fill ? () => css(line.fill) : undefined,
        dash: line.dash,
        width: 2,
        points: { show: false },
        spanGaps: false,
      }))],
    }, this.data);
  }

  add(values) {
    [Date.now() / 1000, ...values].forEach((value, column) => {
      this.data[column].push(value);
      if (this.data[column].length > SPAN * PER_SECOND) this.data[column].shift();
    });
    this.frame.setData(this.data);
  }

  close() {
    this.frame.close();
  }
}
