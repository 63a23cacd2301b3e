"use strict";
// Copy buttons. The clipboard interface is absent on some file:// pages: then the text is selected instead.
for (const button of document.querySelectorAll(".command button")) {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "selected";
    }
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
}
// Values under the pointer in every chart.
const short = (v) => (Math.abs(v) >= 1e4 ? (v / 1e3).toPrecision(3) + "k" : String(+v.toPrecision(4)));
for (const figure of document.querySelectorAll(".chart")) {
  const svg = figure.querySelector("svg"), cross = figure.querySelector(".cross"), tip = figure.querySelector(".tip");
  const series = JSON.parse(figure.dataset.series);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    let at = 0, step = 0;
    const lines = series.map((s) => {
      let best = 0;
      s.x.forEach((px, i) => { if (Math.abs(px - x) < Math.abs(s.x[best] - x)) best = i; });
      at = s.x[best];
      step = s.s[best];
      return s.n + "  " + short(s.y[best]) + figure.dataset.unit;
    });
    cross.setAttribute("x1", at);
    cross.setAttribute("x2", at);
    tip.textContent = "step " + step + "\n" + lines.join("\n");
    tip.hidden = false;
    const left = (at / svg.viewBox.baseVal.width) * box.width + svg.offsetLeft || event.offsetX;
    tip.style.left = (left > box.width / 2 ? left - tip.offsetWidth - 10 : left + 24) + "px";
    tip.style.top = svg.getBoundingClientRect().top - figure.getBoundingClientRect().top + 8 + "px";
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cross.setAttribute("x1", -9);
    cross.setAttribute("x2", -9);
  });
}
