"use strict";

// Theme: the system's, light, or dark; kept for the next time where the browser keeps anything for a file.
(function () {
  const root = document.documentElement, button = document.getElementById("theme"), order = ["system", "light", "dark"];
  let now = "system";
  try { now = localStorage.getItem("sharpscope-theme") || "system"; } catch (error) { /* files may have no storage */ }
  function show() {
    if (now === "system") root.removeAttribute("data-theme"); else root.setAttribute("data-theme", now);
    button.textContent = "Theme: " + now;
    document.dispatchEvent(new Event("themechange"));
  }
  button.hidden = false;
  button.addEventListener("click", function () {
    now = order[(order.indexOf(now) + 1) % order.length];
    try { localStorage.setItem("sharpscope-theme", now); } catch (error) { /* then it lasts as long as the page */ }
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  if (!order.includes(now)) now = "system";
  show();
})();

for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", function () {
    navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent).then(function () {
      button.textContent = "Copied";
      setTimeout(function () { button.textContent = "Copy"; }, 1500);
    });
  });
}

// Paper has no closed parts.
let closed = [];
addEventListener("beforeprint", function () {
  closed = Array.from(document.querySelectorAll("details:not([open])"));
  for (const part of closed) part.open = true;
  // A note that is open would lie above the page and not among the others.
  for (const note of document.querySelectorAll(".note")) if (note.hidePopover) note.hidePopover();
});
addEventListener("afterprint", function () { for (const part of closed) part.open = false; });

// Surfaces to turn: plotly is unpacked and run when asked for.
(function () {
  const start = document.querySelector("[data-scenes]"), packed = document.getElementById("plotly");
  if (!start || !packed || !window.DecompressionStream) return;
  const hint = start.nextElementSibling, stage = hint.nextElementSibling;
  const asked = JSON.parse(document.getElementById(start.dataset.scenes).textContent), plots = [];
  let busy = false;
  start.hidden = false;

  function ink(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
  function layout(scene) {
    const axis = { color: ink("--quiet"), gridcolor: ink("--rule"), showbackground: false, zeroline: false };
    const z = { range: [asked.axis.low, asked.axis.high], tickvals: asked.axis.at, ticktext: asked.axis.told };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", font: { color: ink("--ink"), size: 11 }, margin: { l: 0, r: 0, t: 0, b: 0 },
      coloraxis: { colorscale: "Viridis", cmin: asked.axis.low, cmax: asked.axis.high, showscale: false },
      scene: {
        // From a little further than plotly's own view, which cuts the labels off.
        aspectmode: "cube", camera: { eye: { x: 1.5, y: 1.5, z: 1.1 }, center: { x: 0, y: 0, z: -0.12 } },
        xaxis: Object.assign({ title: { text: "x" } }, axis), yaxis: Object.assign({ title: { text: "y" } }, axis),
        zaxis: Object.assign({ title: { text: "" } }, axis, z),
      },
    };
  }
  async function unpacked() {
    const bytes = Uint8Array.from(atob(packed.textContent), function (c) { return c.charCodeAt(0); });
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }
  async function draw() {
    const script = document.createElement("script");
    script.textContent = await unpacked();
    document.head.appendChild(script);
    stage.hidden = hint.hidden = false;
    for (const scene of asked.scenes) {
      const box = document.createElement("div"), name = document.createElement("p"), place = document.createElement("div");
      name.className = "scene-name";
      name.textContent = scene.name;
      place.className = "scene";
      box.append(name, place);
      stage.append(box);
      await Plotly.newPlot(place, scene.traces, layout(scene), { displaylogo: false, displayModeBar: false, responsive: true });
      plots.push(place);
      place.on("plotly_relayout", function (change) {
        const camera = change["scene.camera"];
        if (!camera || busy) return;
        busy = true;
        Promise.all(plots.map(function (p) { return p === place ? null : Plotly.relayout(p, { "scene.camera": camera }); }))
          .finally(function () { busy = false; });
      });
    }
  }
  start.addEventListener("click", function () {
    start.disabled = true;
    start.textContent = "Unpacking…";
    draw().then(function () { start.hidden = true; stage.dataset.ready = "true"; }, function (error) {
      start.textContent = "3D does not start in this browser: " + error.message;
    });
  });
  document.addEventListener("themechange", function () {
    for (const place of plots) {
      const fresh = layout();
      fresh.scene.camera = place.layout.scene.camera;
      Plotly.relayout(place, fresh);
    }
  });
})();
