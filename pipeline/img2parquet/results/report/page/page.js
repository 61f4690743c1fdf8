"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  for (const image of document.querySelectorAll("img[data-picture]")) {
    image.loading = "lazy";
    image.src = data.pictures[Number(image.dataset.picture)];
  }
  for (const slider of document.querySelectorAll("[data-opacity]")) {
    slider.addEventListener("input", () => {
      slider.closest(".panel").style.setProperty("--mask", String(Number(slider.value) / 100));
    });
  }
  for (const panel of document.querySelectorAll("[data-map]")) drawMap(panel, data.maps[Number(panel.dataset.map)]);

  // A scatter plot on a canvas: the nearest point to the pointer tells who it is.
  function drawMap(panel, map) {
    const canvas = panel.querySelector("canvas"), tip = panel.querySelector(".tip"), stage = panel.querySelector(".stage");
    const count = map.keys.length, radius = count > 1200 ? 3.2 : 4.2, margin = 14;
    let points = Object.values(map.layouts)[0], alone = null, at = -1;

    function place(i) {
      const width = stage.clientWidth - 2 * margin, height = stage.clientHeight - 2 * margin;
      return [margin + points[i][0] * width, margin + (1 - points[i][1]) * height];
    }

    function draw() {
      const ratio = window.devicePixelRatio || 1, pen = canvas.getContext("2d");
      canvas.width = Math.round(stage.clientWidth * ratio);
      canvas.height = Math.round(stage.clientHeight * ratio);
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      const order = [...points.keys()].sort((a, b) => Number(isShown(a)) - Number(isShown(b)));
      for (const i of order) {
        const [x, y] = place(i);
        pen.globalAlpha = isShown(i) ? 0.85 : 0.07;
        pen.fillStyle = map.group[i] < 0 ? map.others : map.colours[map.group[i]];
        pen.beginPath();
        pen.arc(x, y, radius, 0, 7);
        pen.fill();
      }
      if (at >= 0) {
        const [x, y] = place(at);
        pen.globalAlpha = 1;
        pen.lineWidth = 2;
        pen.strokeStyle = getComputedStyle(panel).color;
        pen.beginPath();
        pen.arc(x, y, radius + 3, 0, 7);
        pen.stroke();
      }
    }

    function isShown(i) {
      return alone === null || map.group[i] === alone;
    }

    function nearest(x, y) {
      let best = -1, least = 24 * 24;
      for (let i = 0; i < count; i++) {
        if (!isShown(i)) continue;
        const [px, py] = place(i), far = (px - x) ** 2 + (py - y) ** 2;
        if (far < least) [best, least] = [i, far];
      }
      return best;
    }

    function showTip(i) {
      if (i === at) return;
      at = i;
      tip.replaceChildren();
      tip.hidden = i < 0;
      if (i >= 0) {
        if (map.picture[i] !== null && map.picture[i] !== undefined) {
          const image = document.createElement("img");
          image.src = data.pictures[map.picture[i]];
          image.alt = "";
          tip.append(image);
        }
        for (const text of [map.says[i], map.keys[i]]) {
          if (!text) continue;
          const line = document.createElement("p"), own = document.createElement("bdi");
          own.textContent = text; // never markup: keys and labels are words of others
          line.append(own);
          tip.append(line);
        }
        const [x, y] = place(i), right = x > stage.clientWidth / 2, low = y > stage.clientHeight / 2;
        tip.style.left = right ? "auto" : `${x + 14}px`;
        tip.style.right = right ? `${stage.clientWidth - x + 14}px` : "auto";
        tip.style.top = low ? "auto" : `${y + 10}px`;
        tip.style.bottom = low ? `${stage.clientHeight - y + 10}px` : "auto";
      }
      draw();
    }

    function point(event) {
      const box = canvas.getBoundingClientRect();
      showTip(nearest(event.clientX - box.left, event.clientY - box.top));
    }

    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") showTip(-1); });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") showTip(-1);
      if (!step) return;
      event.preventDefault();
      showTip((at + step + count) % count);
    });
    for (const button of panel.querySelectorAll("[data-group]")) {
      button.addEventListener("click", () => {
        const group = Number(button.dataset.group);
        alone = alone === group ? null : group;
        for (const other of panel.querySelectorAll("[data-group]")) {
          other.setAttribute("aria-pressed", String(alone !== null && Number(other.dataset.group) === alone));
        }
        showTip(-1);
        draw();
      });
    }
    for (const button of panel.querySelectorAll("[data-layout]")) {
      button.addEventListener("click", () => {
        points = map.layouts[button.dataset.layout];
        for (const other of panel.querySelectorAll("[data-layout]")) {
          other.setAttribute("aria-pressed", String(other === button));
        }
        showTip(-1);
        draw();
      });
    }
    new ResizeObserver(draw).observe(stage);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    panel.dataset.points = String(count);
    draw();
  }
})();
