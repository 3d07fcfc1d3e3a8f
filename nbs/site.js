// Small helps for readers; every page is complete without them.
(() => {
  // What scrolls by itself can be reached by the keyboard.
  const reach = () => document.querySelectorAll('main pre, main table, main .math.display, div.sourceCode, #quarto-sidebar, .sidebar').forEach(e => {
    const wider = e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX !== 'visible';
    const taller = e.scrollHeight > e.clientHeight && getComputedStyle(e).overflowY.match(/auto|scroll/);
    if (wider || taller) e.tabIndex = 0; else if (e.getAttribute('tabindex') === '0') e.removeAttribute('tabindex');
  });
  // Links of a single icon say where they lead.
  const named = () => document.querySelectorAll('a, button').forEach(e => {
    if (!e.textContent.trim() && !e.getAttribute('aria-label') && !e.querySelector('img[alt]:not([alt=""])')) e.setAttribute('aria-label', e.title || (e.href || '').replace(/^https?:\/\//, '') || 'menu');
  });
  // An animation can be stopped: by a click, by Enter or Space, and from the start by who wants less motion.
  const pause = svg => {
    const still = () => { svg.pauseAnimations(); svg.setAttribute('aria-label', 'Animation, stopped; press to go on'); };
    const go = () => { svg.unpauseAnimations(); svg.setAttribute('aria-label', 'Animation; press to stop'); };
    const turn = () => svg.animationsPaused() ? go() : still();
    svg.tabIndex = 0; svg.setAttribute('role', 'button');
    svg.addEventListener('click', turn);
    svg.addEventListener('keydown', e => { if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); turn(); } });
    if (matchMedia('(prefers-reduced-motion: reduce)').matches) still(); else go();
  };
  const begin = () => {
    named(); reach();
    document.querySelectorAll('main svg').forEach(svg => { if (svg.querySelector('animate, animateTransform, animateMotion, set')) pause(svg); });
    document.fonts.ready.then(reach);  // formulas are as wide as their fonts
    addEventListener('resize', reach);
  };
  if (document.readyState === 'complete') begin(); else addEventListener('load', begin);
})();
