// The bandit on a tree of 16 leaves: node i has the children 2i and 2i + 1, leaves are 16 to 31.
(() => {
  const MEANS = [0.24, 0.19, 0.10, 0.15, 0.33, 0.29, 0.38, 0.42,
                 0.71, 0.66, 0.78, 0.74, 0.58, 0.55, 0.62, 0.69];
  const BEST = Math.min(...MEANS), BLUE = "#3288c8", RED = "#d9601a";

  function luck(seed) { // uniform numbers in [0, 1), the same for the same seed
    return () => {
      seed = (seed + 0x6D2B79F5) | 0;
      let x = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
      return ((x ^ (x >>> 14)) >>> 0) / 4294967296;
    };
  }

  function newGame(seed) {
    return { t: 0, n: Array(32).fill(0), mu: Array(32).fill(0), path: [], regret: 0, random: luck(seed) };
  }

  function bound(game, node, c, delta) { // Eq. 2
    if (game.n[node] === 0) return -Infinity;
    const own = game.mu[node] - 2 * c * Math.sqrt(Math.log(game.t) / game.n[node]);
    if (node >= 16) return own;
    const below = Math.min(bound(game, 2 * node, c, delta), bound(game, 2 * node + 1, c, delta));
    return Math.max(below, own - delta / 2 ** Math.floor(Math.log2(node)));
  }

  function step(game, c, delta) { // one round: descend, look, remember
    game.t += 1;
    let node = 1;
    game.path = [node];
    while (node < 16) {
      const left = bound(game, 2 * node, c, delta), right = bound(game, 2 * node + 1, c, delta);
      node = left <= right ? 2 * node : 2 * node + 1;
      game.path.push(node);
    }
    const mean = MEANS[node - 16], loss = mean + 0.06 * (game.random() - 0.5);
    for (const k of game.path) { game.n[k] += 1; game.mu[k] += (loss - game.mu[k]) / game.n[k]; }
    game.regret += mean - BEST;
    return game;
  }

  const place = node => { // a leaf in its column, an inner node above the middle of its leaves
    const depth = Math.floor(Math.log2(node)), width = 16 / 2 ** depth;
    return [20 + 40 * ((node - 2 ** depth + 0.5) * width - 0.5), 16 + 48 * depth];
  };

  function picture(game) { // the tree as SVG
    const inPath = new Set(game.path), parts = [];
    for (let k = 2; k < 32; k++) {
      const [x1, y1] = place(k >> 1), [x2, y2] = place(k), on = inPath.has(k);
      parts.push(`<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}" stroke="${on ? RED : "currentColor"}"` +
        ` stroke-opacity="${on ? 1 : 0.35}" stroke-width="${1 + 0.9 * Math.sqrt(game.n[k])}"/>`);
    }
    const most = Math.max(10, ...game.n.slice(16));
    MEANS.forEach((mean, k) => {
      const [x, y] = place(16 + k), n = game.n[16 + k], best = mean === BEST;
      parts.push(`<circle cx="${x}" cy="${y}" r="16" fill="${BLUE}" fill-opacity="${1 - mean}"` +
        ` stroke="${best ? RED : "currentColor"}" stroke-width="${best ? 4 : 1}"/>`,
        `<text x="${x}" y="${y + 4}" text-anchor="middle" fill="currentColor" font-size="12">${Math.round(100 * mean)}</text>`,
        `<rect x="${x - 11}" y="${y + 22}" width="22" height="${50 * n / most}" fill="${BLUE}"/>`,
        `<text x="${x}" y="${y + 36 + 50 * n / most}" text-anchor="middle" fill="currentColor" font-size="12">${n}</text>`);
    });
    return `<svg viewBox="0 0 640 300" width="100%" role="img" aria-label="Tree of 16 leaves after ${game.t} rounds">${parts.join("")}</svg>`;
  }

  function told(game) {
    const best = game.n[16 + MEANS.indexOf(BEST)], untried = game.n.slice(16).filter(n => n === 0).length;
    return `Round ${game.t}: the best leaf was pulled ${best} times, ${untried} leaves were never tried, ` +
      `regret ${game.regret.toFixed(1)} (a blind player's: ${(game.t * MEANS.reduce((s, m) => s + m - BEST, 0) / 16).toFixed(1)}).`;
  }

  function build(root) {
    root.innerHTML = `<div style="max-width:640px;color:inherit">
      <p><button type="button" data-do="play">Play</button> <button type="button" data-do="step">Step</button>
      <button type="button" data-do="restart">Restart</button>
      <label style="white-space:nowrap">width c <input type="range" data-c min="0" max="1" step="0.05" value="0.05"> <output></output></label>
      <label style="white-space:nowrap">slack &delta; <input type="range" data-delta min="0" max="1.6" step="0.1" value="0.8"> <output></output></label></p>
      <div data-picture></div><p data-told aria-live="polite"></p></div>`;
    const find = s => root.querySelector(s), c = find("[data-c]"), delta = find("[data-delta]"), play = find("[data-do=play]");
    let seed = 1, game = newGame(seed), timer = null;
    const draw = () => {
      for (const x of [c, delta]) x.parentNode.querySelector("output").textContent = Number(x.value).toFixed(2);
      find("[data-picture]").innerHTML = picture(game);
      if (!timer || game.t % 10 === 0) find("[data-told]").textContent = told(game);
    };
    const pause = () => { clearInterval(timer); timer = null; play.textContent = "Play"; draw(); };
    const round = () => { step(game, Number(c.value), Number(delta.value)); if (game.t >= 500) pause(); else draw(); };
    play.onclick = () => {
      if (timer) return pause();
      play.textContent = "Pause";
      timer = setInterval(() => root.isConnected ? round() : pause(), 250);
    };
    find("[data-do=step]").onclick = () => { pause(); round(); };
    find("[data-do=restart]").onclick = () => { game = newGame(seed += 1); pause(); };
    for (const x of [c, delta]) x.oninput = draw;
    draw();
  }

  if (typeof document !== "undefined") document.querySelectorAll("[data-explorable=bandit]:empty").forEach(build);
  else module.exports = { MEANS, newGame, bound, step, picture, told };
})();
