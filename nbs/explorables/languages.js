// The tree of languages, growing task by task: levels are lists of groups, from the root down, as results keep them.
(() => {
  const BLUE = "#3288c8", ORANGE = "#d9601a";

  function nodes(levels) { // every group of every level once, with its children; leaves in drawing order
    const build = (group, depth) => {
      const below = (levels[depth + 1] || []).filter(g => g.every(x => group.includes(x)));
      if (group.length === 1 || below.length === 0) return { group, children: group.length === 1 ? [] : group.map(x => ({ group: [x], children: [] })) };
      return below.length === 1 ? build(below[0], depth + 1) : { group, children: below.map(g => build(g, depth + 1)) };
    };
    return build(levels[0][0], 0);
  }

  function placed(root) { // x of the leaves in order, inner nodes between their children
    const list = [];
    let next = 0;
    const walk = (node, depth, parent) => {
      const me = { ...node, depth, parent };
      list.push(me);
      const below = node.children.map(child => walk(child, depth + 1, me));
      me.x = below.length ? below.reduce((s, c) => s + c.x, 0) / below.length : next++;
      return me;
    };
    walk(root, 0, null);
    return list;
  }

  function picture(data, run, n) { // the tree after n tasks as SVG
    const list = placed(nodes(run.trees[n - 1])), step = 90, down = 42;
    const color = code => data.families[code] === "Romance" ? BLUE : ORANGE, parts = [];
    const xy = node => [60 + step * node.x, 24 + down * node.depth];
    for (const node of list) {
      const [x, y] = xy(node), families = new Set(node.group.map(color)), paint = families.size === 1 ? [...families][0] : "currentColor";
      if (node.parent) {
        const [px, py] = xy(node.parent);
        parts.push(`<path d="M${px} ${py + 14}H${x}V${y}" fill="none" stroke="${paint}" stroke-width="2"/>`);
      }
      if (node.children.length) parts.push(`<path d="M${x} ${y}V${y + 14}" stroke="${paint}" stroke-width="2"/>`);
      else {
        const fresh = node.group[0] === run.tasks[n - 1];
        parts.push(`<circle cx="${x}" cy="${y + 4}" r="${fresh ? 7 : 5}" fill="${paint}"/>`,
          `<text x="${x}" y="${y + 26}" text-anchor="middle" fill="currentColor" font-size="14"` +
          ` font-weight="${fresh ? "bold" : "normal"}">${data.names[node.group[0]]}</text>`);
      }
    }
    return `<svg viewBox="0 0 600 290" width="100%" role="img" aria-label="Tree after ${n} languages">${parts.join("")}</svg>`;
  }

  function told(data, run, n) {
    const split = nodes(run.trees[n - 1]).children.map(c => c.group.map(x => data.names[x]).join(", "));
    return `${n} of ${run.tasks.length}: ${data.names[run.tasks[n - 1]]} is new. ` +
      (split.length > 1 ? `The root parts ${split.join(" | ")}.` : "One leaf, no cut.");
  }

  function build(root) {
    const data = JSON.parse(root.nextElementSibling.textContent);
    root.innerHTML = `<div style="max-width:600px;color:inherit">
      <p><label style="white-space:nowrap">run <select></select></label>
      <label style="white-space:nowrap">languages learned <input type="range" min="1" max="6" step="1" value="1"> <output></output></label>
      <button type="button" data-do="back">Back</button> <button type="button" data-do="next">Next</button></p>
      <div data-picture></div><p data-told aria-live="polite"></p>
      <p><span style="color:${BLUE}">&#9679;</span> Romance <span style="color:${ORANGE}">&#9679;</span> Germanic</p></div>`;
    const find = s => root.querySelector(s), runs = find("select"), slider = find("input");
    data.runs.forEach((run, k) => runs.add(new Option(run.name, k)));
    const draw = () => {
      const run = data.runs[Number(runs.value)], n = Number(slider.value);
      find("output").textContent = n;
      find("[data-picture]").innerHTML = picture(data, run, n);
      find("[data-told]").textContent = told(data, run, n);
    };
    const go = by => { slider.value = Number(slider.value) + by; draw(); };
    find("[data-do=back]").onclick = () => go(-1);
    find("[data-do=next]").onclick = () => go(1);
    runs.onchange = slider.oninput = draw;
    draw();
  }

  if (typeof document !== "undefined") document.querySelectorAll("[data-explorable=languages]:empty").forEach(build);
  else module.exports = { nodes, placed, picture, told };
})();
