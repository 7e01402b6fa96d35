"use strict";
// Tabs, plots drawn when they are first seen (a hidden plot has no width), and players for recorded episodes.

const COLOURS = { "right context": "#0072B2", "wrong context": "#D55E00" };

function payload(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

function show(button) {
  const bar = button.parentElement;
  for (const other of bar.children) {
    const selected = other === button;
    other.setAttribute("aria-selected", String(selected));
    other.tabIndex = selected ? 0 : -1;
    document.getElementById(other.dataset.panel).hidden = !selected;
  }
  draw(document.getElementById(button.dataset.panel));
}

function draw(panel) {
  for (const place of panel.querySelectorAll(".plot:not([data-drawn])")) {
    if (place.closest("section[hidden]")) continue;
    place.dataset.drawn = "yes";
    const figure = payload(place.dataset.source);
    Plotly.newPlot(place, figure.data, figure.layout, { responsive: true, displaylogo: false });
  }
}

function player(box) {
  const recorded = payload(box.dataset.source);
  const slider = box.querySelector("input");
  const button = box.querySelector("button");
  const frames = recorded.frames ? frameViews(box, recorded) : pathViews(box, recorded);
  slider.max = frames.length - 1;
  let timer = null;
  const go = (step) => { slider.value = step; frames.show(Number(step)); };
  slider.addEventListener("input", () => frames.show(Number(slider.value)));
  button.addEventListener("click", () => {
    if (timer) { clearInterval(timer); timer = null; button.textContent = "Play"; return; }
    button.textContent = "Pause";
    timer = setInterval(() => go((Number(slider.value) + 1) % frames.length), recorded.milliseconds);
  });
  go(frames.length - 1);
}

function frameViews(box, recorded) {
  const images = [...box.querySelectorAll("img")];
  return {
    length: Math.max(...recorded.frames.map((list) => list.length)),
    show(step) {
      images.forEach((image, e) => { image.src = recorded.frames[e][Math.min(step, recorded.frames[e].length - 1)]; });
    },
  };
}

function pathViews(box, recorded) {
  const canvases = [...box.querySelectorAll("canvas")];
  const all = Object.values(recorded.paths).flat(2).concat(recorded.goals);
  const reach = Math.max(...all.map(([x, y]) => Math.max(Math.abs(x), Math.abs(y)))) + recorded.radius;
  const length = Object.values(recorded.paths)[0][0].length;
  function show(step) {
    canvases.forEach((canvas, e) => {
      const pen = canvas.getContext("2d"), size = canvas.width, scale = size / (2 * reach);
      const at = ([x, y]) => [size / 2 + x * scale, size / 2 - y * scale];
      pen.clearRect(0, 0, size, size);
      pen.lineWidth = 1;
      pen.strokeStyle = "#b00020";
      pen.beginPath();
      pen.arc(...at(recorded.goals[e]), recorded.radius * scale, 0, 2 * Math.PI);
      pen.stroke();
      pen.fillStyle = "#000";
      pen.fillRect(size / 2 - 2, size / 2 - 2, 4, 4);
      for (const [name, paths] of Object.entries(recorded.paths)) {
        pen.strokeStyle = pen.fillStyle = COLOURS[name];
        pen.lineWidth = 1.5;
        pen.beginPath();
        paths[e].slice(0, step + 1).forEach((point, t) => (t ? pen.lineTo(...at(point)) : pen.moveTo(...at(point))));
        pen.stroke();
        pen.beginPath();
        pen.arc(...at(paths[e][step]), 4, 0, 2 * Math.PI);
        pen.fill();
      }
    });
  }
  return { length, show };
}

document.addEventListener("DOMContentLoaded", () => {
  for (const bar of document.querySelectorAll("nav")) {
    bar.addEventListener("click", (event) => { if (event.target.dataset.panel) show(event.target); });
    bar.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const tabs = [...bar.children];
      const next = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
      next.focus();
      show(next);
    });
  }
  document.querySelectorAll(".player").forEach(player);
  draw(document.body);
});
