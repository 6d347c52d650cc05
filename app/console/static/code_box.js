// A request as code, in the language that is picked.

import { key } from "./api.js";
import { copyButton, h, setText } from "./dom.js";

// `write` returns the texts by language; it is asked when the box is opened and when it is drawn again.
export class CodeBox {
  constructor(write) {
    this.write = write;
    this.kind = "curl";
    this.box = h("div", {});
    this.element = h("details", { class: "snippets", ontoggle: () => this.draw() }, h("summary", {}, "Use it from code"), this.box);
  }

  draw() {
    if (!this.element.open) return;
    const texts = this.write(new URL(".", location.href.split("#")[0]).href, Boolean(key()));
    const shown = h("pre", { tabindex: "0", role: "region", "aria-label": "Code" });
    const buttons = Object.keys(texts).map((kind) => h("button", { type: "button", class: "small", onclick: () => pick(kind) }, kind));
    const pick = (kind) => {
      this.kind = kind;
      setText(shown, texts[kind]);
      buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.textContent === kind)));
    };
    pick(this.kind in texts ? this.kind : "curl");
    this.box.replaceChildren(h("div", { class: "segments", role: "group", "aria-label": "Language" }, buttons, copyButton(() => texts[this.kind])), shown);
  }
}
