// The batch as lanes: time runs to the left, a bar is a request, its colour the task.

import { fill, taskVars } from "./colours.js";
import { h, setText, setVars } from "./dom.js";

const TICK = 0.25;  // seconds between snapshots
const DELAY = 0.35;  // what is drawn lies so far back, so that bars grow smoothly
const LABELLED = 32;  // more lanes than that are too thin for words
const FEWEST = 6;

export class Lanes {
  constructor() {
    this.bars = [];  // {row, request, task, version, start, end, encoded, prefilled}: seconds of performance.now()
    this.rows = [];
    this.labels = [];
    this.canvas = h("canvas", { role: "img", "aria-label": "Requests in the batch over time" });
    this.list = h("ol", { class: "lane-labels", "aria-label": "What runs in each lane now" });
    this.element = h("div", { class: "lanes" }, this.canvas, this.list);
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    this.frame = null;
    this.paused = false;
    this.step = () => { this.frame = requestAnimationFrame(this.step); this.draw(); };
    if (!this.calm.matches) this.step();
  }

  get span() {
    return this.canvas.clientWidth < 420 ? 10 : 20;
  }

  add(rows) {
    const now = performance.now() / 1000;
    const open = new Map(this.bars.filter((bar) => bar.open).map((bar) => [bar.request, bar]));
    for (const bar of open.values()) bar.open = false;
    for (const row of rows) {
      const bar = open.get(row.request) ?? this.begin(row, now);
      bar.end = now;
      bar.open = true;
      if (row.phase === "encode") bar.encoded = now;
      if (row.phase !== "decode") bar.prefilled = now;
    }
    this.rows = rows;
    this.bars = this.bars.filter((bar) => bar.end > now - this.span - 2);
    this.layOut();
    if (this.calm.matches) this.draw();
  }

  begin(row, now) {
    const bar = { ...row, start: now - TICK, encoded: now - TICK, prefilled: now - TICK };
    this.bars.push(bar);
    return bar;
  }

  layOut() {
    const count = Math.max(FEWEST, ...this.bars.map((bar) => bar.row + 1));
    const height = count <= 12 ? 26 : count <= 20 ? 20 : count <= LABELLED ? 16 : 8;
    if (count !== this.count) {
      this.count = count;
      this.height = height;
      setVars(this.element, { lane: `${height}px` });
      this.element.classList.toggle("thin", count > LABELLED);
      this.labels = Array.from({ length: count }, () => label());
      this.list.replaceChildren(...this.labels.map((each) => each.element));
    }
    const byRow = new Map(this.rows.map((row) => [row.row, row]));
    this.labels.forEach((each, number) => each.tell(byRow.get(number)));
  }

  draw() {
    if (this.paused || !this.count) return;
    const ratio = devicePixelRatio || 1;
    const [width, height] = [this.canvas.clientWidth, this.count * this.height];
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    this.drawGround(context, width);
    const edge = performance.now() / 1000 - (this.calm.matches ? 0 : DELAY);
    const x = (time) => width - (edge - time) * (width / this.span);
    for (const bar of this.bars) this.drawBar(context, bar, x, width);
  }

  drawGround(context, width) {
    context.fillStyle = getComputedStyle(this.canvas).getPropertyValue("--ground");
    const gap = this.height > 10 ? 2 : 1;
    for (let lane = 0; lane < this.count; lane += 1) {
      context.fillRect(0, lane * this.height + gap, width, this.height - 2 * gap);
    }
  }

  drawBar(context, bar, x, width) {
    const gap = this.height > 10 ? 2 : 1;
    const [top, tall] = [bar.row * this.height + gap, this.height - 2 * gap];
    const from = x(bar.start) + 0.75;
    const to = Math.min(width, bar.open ? Math.max(x(bar.end), width) : x(bar.end)) - 0.75;
    if (to <= 0 || from >= width) return;
    const [read, turn] = [Math.min(to, x(bar.encoded)), Math.min(to, x(bar.prefilled))];
    context.fillStyle = fill(bar.task);
    context.beginPath();
    context.roundRect(from, top, Math.max(to - from, 1), tall, Math.min(3, tall / 3));
    context.fill();
    if (read > from) this.hatch(context, from, top, read - from, tall, true);
    if (turn > Math.max(from, read)) this.hatch(context, Math.max(from, read), top, turn - Math.max(from, read), tall);
    this.name(context, bar, Math.max(from, 0), to, top + tall / 2);
  }

  // Prefill: stripes, so that it differs by more than its shade; the encoder's pass: stripes both ways.
  hatch(context, left, top, wide, tall, isCrossed = false) {
    context.save();
    context.beginPath();
    context.rect(left, top, wide, tall);
    context.clip();
    context.strokeStyle = getComputedStyle(this.canvas).getPropertyValue("--stripe");
    context.lineWidth = 2;
    context.beginPath();
    const first = Math.floor(left / 5) * 5 - tall;
    for (let at = first; at < left + wide + tall; at += 5) {
      context.moveTo(at, top + tall);
      context.lineTo(at + tall, top);
      if (isCrossed) { context.moveTo(at, top); context.lineTo(at + tall, top + tall); }
    }
    context.stroke();
    context.restore();
  }

  name(context, bar, from, to, middle) {
    if (this.height < 16 || to - from < 60) return;
    const text = title(bar);
    context.font = "600 11px system-ui";
    if (context.measureText(text).width > to - from - 12) return;
    context.fillStyle = getComputedStyle(this.canvas).getPropertyValue("--on-task");
    context.textBaseline = "middle";
    context.fillText(text, from + 6, middle + 0.5);
  }

  describe() {
    const tasks = new Set(this.rows.map((row) => row.task ?? "base model"));
    const names = [...tasks].sort().join(", ");
    const words = this.rows.length ? `${this.rows.length} requests of ${tasks.size} tasks in the batch: ${names}` : "No request in the batch";
    this.canvas.setAttribute("aria-label", words);
  }

  close() {
    cancelAnimationFrame(this.frame);
  }
}

export function title(row) {
  return row.task ? `${row.task} v${row.version}` : "base model";
}

function label() {
  const [name, phase, tokens] = [h("span", { class: "name" }), h("span", { class: "phase" }), h("span", { class: "tokens" })];
  const element = h("li", {}, h("i", { class: "dot", "aria-hidden": "true" }), name, phase, tokens);
  return {
    element,
    tell(row) {
      element.dataset.phase = row?.phase ?? "free";
      setText(name, row ? title(row) : "free");
      setText(phase, row?.phase ?? "");
      setText(tokens, row ? `${row.source ? `${row.source} → ` : ""}${row.tokens}` : "");
      setVars(element, taskVars(row?.task));
    },
  };
}
