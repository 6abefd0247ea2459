// Small things: building elements, and writing numbers for people. Knows nothing of engines or requests.

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

// Text reaches the page through text nodes only, styles through the style object: both hold under the page's CSP.
export function el(tag, props = {}, ...kids) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key === 'style') node.style.cssText = value;
    else if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else if (key === 'class') node.className = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...kids.flat().filter(kid => kid !== null && kid !== undefined && kid !== false));
  return node;
}

export function svg(tag, props = {}, ...kids) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [key, value] of Object.entries(props)) node.setAttribute(key, value);
  node.append(...kids);
  return node;
}

export const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const calm = matchMedia('(prefers-reduced-motion: reduce)');

// Numbers. A value that was not measured (null) is a dash, never a zero.
export const missing = x => x === null || x === undefined || Number.isNaN(x);
export const int = n => missing(n) ? '–' : Math.round(n).toLocaleString('en-US');
export const pct = (x, digits = 0) => missing(x) ? '–' : (100 * x).toFixed(digits) + ' %';
export const plural = (n, word) => `${int(n)} ${word}${n === 1 ? '' : 's'}`;

export function short(n) {
  if (missing(n)) return '–';
  if (n >= 1e6) return (n / 1e6).toFixed(1) + 'M';
  if (n >= 1e4) return (n / 1e3).toFixed(n >= 1e5 ? 0 : 1) + 'k';
  return n > 0 && n < 10 ? String(+n.toFixed(1)) : int(n);
}

export function ms(s) {
  if (missing(s)) return '–';
  if (s >= 10) return s.toFixed(1) + ' s';
  if (s >= 1) return s.toFixed(2) + ' s';
  return (s * 1e3).toFixed(s >= .01 ? 0 : 1) + ' ms';
}

export function rate(b) { // bytes per second
  if (missing(b)) return '–';
  for (const [size, unit] of [[1e9, 'GB/s'], [1e6, 'MB/s'], [1e3, 'kB/s']]) {
    if (b >= size) return `${b >= 100 * size ? (b / size).toFixed(0) : (b / size).toFixed(1)} ${unit}`;
  }
  return `${b.toFixed(0)} B/s`;
}

export function since(s) {
  if (s >= 86400) return `${s / 86400 | 0} d ${s % 86400 / 3600 | 0} h`;
  if (s >= 3600) return `${s / 3600 | 0} h ${s % 3600 / 60 | 0} min`;
  return s >= 60 ? `${s / 60 | 0} min ${s % 60 | 0} s` : `${Math.floor(s)} s`;
}

export function tip(event, text) {
  const box = $('#tip');
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  box.style.left = Math.min(innerWidth - 310, event.clientX + 14) + 'px';
  box.style.top = event.clientY + 16 + 'px';
}
