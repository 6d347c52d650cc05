// A choice of a task, and of one of its versions or aliases; "" is the base model.

import { call, taskPath } from "./api.js";
import { h, options } from "./dom.js";
import { fieldsOf } from "./snippets.js";

const OF_CHAINS = ["so_far", "last"];

export class TaskPicker {
  // `reference`: "", "task" or "task@version". `changed` is called when there is something else to ask.
  constructor(tasks, reference, changed) {
    this.changed = changed;
    this.detail = null;
    const [task, version] = reference.split("@");
    this.taskChoice = h("select", { "aria-label": "Task" }, options([["", "base model"], ...tasks.map((each) => [each.id, each.id])], task));
    this.versionChoice = h("select", { "aria-label": "Version" });
    this.taskChoice.addEventListener("change", () => this.choose(this.task));
    this.versionChoice.addEventListener("change", () => changed());
    this.ready = Promise.resolve().then(() => this.choose(task, version));
  }

  get task() {
    return this.taskChoice.value;
  }

  get reference() {
    return this.task && this.versionChoice.value ? `${this.task}@${this.versionChoice.value}` : this.task;
  }

  // What answers: a version's number, or what the alias says instead.
  get target() {
    return Number(this.versionChoice.value) || this.detail?.aliases[this.versionChoice.value || "live"];
  }

  get isEnsemble() {
    return Boolean(this.target?.ensemble);
  }

  // The version that answers, as far as one can know: an alias may mean several.
  get version() {
    const target = this.target;
    const wanted = typeof target === "object" ? target.version ?? Number(Object.keys(target.weights ?? target)[0]) : target;
    return this.detail?.versions.find((each) => each.version === wanted) ?? this.detail?.versions.at(-1);
  }

  // Those of its inputs; options are filled in from the version's choices, and steps by the server.
  get fields() {
    const { template, chain, choices } = this.version ?? {};
    const filled = choices?.length ? ["options", ...OF_CHAINS] : OF_CHAINS;
    return fieldsOf(template ?? chain?.template).filter((name) => !filled.includes(name));
  }

  async choose(task, version = "") {
    this.detail = null;
    this.versionChoice.hidden = !task;
    this.versionChoice.replaceChildren(...options([["", "live"]], ""));
    if (task) {
      const detail = await call(taskPath(task)).catch(() => null);
      if (task !== this.task) return;  // another one was chosen meanwhile
      this.detail = detail;
      const numbers = (this.detail?.versions ?? []).map((each) => [each.version, `v${each.version}`]).reverse();
      const others = Object.keys(this.detail?.aliases ?? {}).filter((alias) => alias !== "live").map((alias) => [alias, alias]);
      this.versionChoice.replaceChildren(...options([["", "live"], ...others, ...numbers], version));
    }
    this.changed();
  }
}
