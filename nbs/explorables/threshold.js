// The soft threshold: differences to the branch as bars; those within the threshold snap to zero.
(() => {
  const WEIGHTS = [0.92, -0.11, 0.05, -0.64, 0.22, 0.02, -0.31, 0.13, 0.47, -0.07, 0.18, -0.83,
                   0.09, -0.26, 0.01, 0.38, -0.15, 0.55, -0.04, 0.29]; // theta less branch
  const BLUE = "#3288c8", GREEN = "#149b71";

  const soft = (x, tau) => Math.sign(x) * Math.max(Math.abs(x) - tau, 0);

  function picture(weights, tau) {
    const at = v => 120 - 105 * v, parts = [];
    parts.push(`<rect x="0" y="${at(tau)}" width="640" height="${at(-tau) - at(tau)}" fill="${GREEN}" fill-opacity="0.15"/>`,
      `<line x1="0" y1="120" x2="640" y2="120" stroke="currentColor"/>`);
    weights.forEach((w, k) => {
      const x = 16 + 31 * k, after = soft(w, tau), bar = (v, more) =>
        `<rect x="${x}" y="${Math.min(at(v), 120)}" width="20" height="${Math.abs(at(v) - 120)}" ${more}/>`;
      parts.push(bar(w, `fill="none" stroke="currentColor" stroke-opacity="0.6" stroke-dasharray="3 2"`),
        after === 0 ? `<circle cx="${x + 10}" cy="120" r="5" fill="${GREEN}"/>` : bar(after, `fill="${BLUE}"`));
    });
    parts.push(`<line data-tau x1="0" y1="${at(tau)}" x2="640" y2="${at(tau)}" stroke="${GREEN}" stroke-width="6" style="cursor:ns-resize;touch-action:none"/>`);
    return `<svg viewBox="0 0 640 240" width="100%" role="img" aria-label="Twenty weights as bars, threshold ${tau.toFixed(2)}">${parts.join("")}</svg>`;
  }

  function told(weights, tau) {
    const zeros = weights.filter(w => soft(w, tau) === 0).length;
    return `${zeros} of ${weights.length} weights lie exactly on the branch (green); each other one is ${tau.toFixed(2)} nearer to it.`;
  }

  function build(root) {
    root.innerHTML = `<div style="max-width:640px;color:inherit">
      <p><label style="white-space:nowrap">threshold &tau; = &alpha;&lambda; <input type="range" min="0" max="1" step="0.01" value="0.2"> <output></output></label>
      <button type="button" data-do="again">Apply once more</button> <button type="button" data-do="reset">Reset</button></p>
      <div data-picture></div><p data-told aria-live="polite"></p></div>`;
    const find = s => root.querySelector(s), slider = find("input"), frame = find("[data-picture]");
    let weights = [...WEIGHTS], held = false;
    const draw = () => {
      const tau = Number(slider.value);
      find("output").textContent = tau.toFixed(2);
      frame.innerHTML = picture(weights, tau);
      find("[data-told]").textContent = told(weights, tau);
    };
    const drag = event => { // the green line follows the pointer
      if (!held) return;
      const box = frame.getBoundingClientRect(), y = 240 * (event.clientY - box.top) / box.height;
      slider.value = Math.min(1, Math.max(0, (120 - y) / 105));
      draw();
    };
    frame.onpointerdown = event => { held = event.target.hasAttribute("data-tau"); if (held) frame.setPointerCapture(event.pointerId); };
    frame.onpointermove = drag;
    frame.onpointerup = frame.onpointercancel = () => { held = false; };
    slider.oninput = draw;
    find("[data-do=again]").onclick = () => { weights = weights.map(w => soft(w, Number(slider.value))); draw(); };
    find("[data-do=reset]").onclick = () => { weights = [...WEIGHTS]; draw(); };
    draw();
  }

  if (typeof document !== "undefined") document.querySelectorAll("[data-explorable=threshold]:empty").forEach(build);
  else module.exports = { WEIGHTS, soft, picture, told };
})();
