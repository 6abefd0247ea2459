// The engine as a picture: requests wait at the intake, blocks are water in a pipe, a runner turns as tokens leave.
// Only areas and speed carry the picture: the waves have mean zero, so it never lies about counts.

import { $, $$, calm, css, el, int, missing, pct, short, svg, tip } from './dom.js';
import { drawLinks } from './cluster.js';
import { LETTER, REASON, STATES, STATE_NAME, STATE_TIP, live } from './state.js';

const MAX_CELLS = 1640, BLADE = 'M20 15.5c4-1 6.5-4.5 6.2-9.5';
const pools = new Map(); // engine id -> {canvas, gauge, shown counts, cells}
let spin = null, order = 'level', colour = {}, lastDraw = 0;

const turbine = () => svg('svg', { viewBox: '0 0 40 40', class: 'turbine', 'aria-hidden': 'true' },
  svg('circle', { cx: 20, cy: 20, r: 18.5 }),
  svg('g', { class: 'runner' },
    ...[...Array(8)].map((_, i) => svg('path', { d: BLADE, transform: `rotate(${i * 45} 20 20)` })),
    svg('circle', { cx: 20, cy: 20, r: 3, class: 'hub' })));

function pool(engine, wide) {
  const canvas = el('canvas', { role: 'img' }), gauge = el('div', { class: 'gauge' });
  pools.set(engine.id, { canvas, gauge: wide ? gauge : null, from: null, to: null, t0: 0, cells: null });
  canvas.addEventListener('pointermove', event => tip(event, poolTip(engine.id)));
  canvas.addEventListener('pointerleave', () => tip());
  return el('div', { class: 'pipe' }, el('div', { class: 'bore' }, canvas), wide ? gauge : null);
}

function poolTip(id) {
  const kv = live.snap.engines.find(engine => engine.id === id).kv;
  const held = missing(kv.used) ? null : kv.used + kv.shared + kv.filling;
  return `${int(kv.num_blocks)} blocks of ${kv.block_size} tokens. `
    + `In use ${int(held)}, cached ${int(kv.cached)}, free ${int(kv.free)}.`;
}

export function buildScene() {
  const { engines } = live.hello, scene = $('#scene');
  pools.clear();
  scene.textContent = '';
  const intake = el('div', { class: 'end in' },
    el('div', { class: 'big', id: 's-wait' }, '–'), el('div', { class: 'lab' }, 'waiting'),
    el('div', { class: 'drops', id: 's-drops', 'aria-hidden': 'true' }), el('div', { class: 'tiny', id: 's-why' }));
  const out = el('div', { class: 'end out' }, turbine(),
    el('div', { class: 'big', id: 's-run' }, '–'), el('div', { class: 'lab' }, 'running'),
    el('div', { class: 'tiny', id: 's-out' }));
  const stub = () => el('div', { class: 'stub', 'aria-hidden': 'true' });
  if (engines.length === 1) {
    scene.className = 'scene one';
    scene.append(intake, stub(), pool(engines[0], true), stub(), out);
    const kv = engines[0].kv;
    $('#scene-sub').textContent = `${int(kv.num_blocks)} blocks of ${kv.block_size} tokens`;
  } else {
    scene.className = 'scene pd';
    const card = engine => el('div', { class: 'eng', 'data-id': engine.id },
      el('div', { class: 'eh' },
        el('strong', {}, engine.id), el('span', {}, `${engine.role} · ${engine.device}`), el('em')),
      pool(engine, false), el('div', { class: 'ef' }, el('span'), el('span')));
    const prefill = engines.filter(engine => engine.role === 'prefill');
    const decode = engines.filter(engine => engine.role !== 'prefill');
    const column = part => el('div', { class: 'col' }, part.map(card));
    const links = el('div', { class: 'links', id: 'links' }, svg('svg'), el('div', { class: 'flow-facts' }));
    scene.classList.toggle('alike', !prefill.length); // engines that do both: nothing flows between columns
    scene.append(intake, ...prefill.length ? [column(prefill), links] : [], column(decode), out);
    const count = (part, name) => part.length ? `${part.length} ${name}` : '';
    $('#scene-sub').textContent = [count(prefill, 'prefill'), count(decode, prefill.length ? 'decode' : 'engines')]
      .filter(Boolean).join(', ');
  }
  spin = calm.matches ? null : $('.runner', scene).animate(
    [{ transform: 'rotate(0)' }, { transform: 'rotate(360deg)' }], { duration: 6000, iterations: Infinity });
  $('#legend').replaceChildren(
    ...STATES.map(state => el('li', { title: STATE_TIP[state] },
      el('i', { class: 'sw ' + state, style: `background:var(--${state})` }),
      STATE_NAME[state], el('b', { 'data-s': state }))),
    el('li', { class: 'note', id: 'legend-note' }));
}

export function updateScene() {
  const { snap } = live, totals = snap.totals, speed = snap.series.generation_tokens_per_s;
  $('#s-wait').textContent = int(totals.num_requests_waiting);
  const drops = $('#s-drops'), n = Math.min(16, totals.num_requests_waiting || 0);
  while (drops.children.length > n) drops.lastChild.remove();
  while (drops.children.length < n) drops.append(el('i'));
  const reasons = Object.entries(totals.num_requests_waiting_by_reason).filter(([, number]) => number);
  const why = reasons.map(([reason, number]) => el('div', {}, `${REASON[reason] || reason}: ${number}`));
  $('#s-why').replaceChildren(...why);
  $('#s-run').textContent = int(totals.num_requests_running);
  $('#s-out').replaceChildren(
    el('div', {}, `${short(speed)} tok/s out`), el('div', {}, `${int(totals.num_preemptions_total)} preempted`));
  const idle = !totals.num_requests_running && !speed;
  $('#scene').classList.toggle('idle', idle);
  // From a word at a time to thousands of tokens a second: the runner's speed goes with the logarithm.
  if (idle) spin?.pause();
  else { spin?.play(); spin?.updatePlaybackRate(.25 + .7 * Math.log10(1 + (speed || 0))); }
  for (const engine of snap.engines) updatePool(engine);
  for (const state of STATES) {
    const counts = snap.engines.map(engine => engine.kv[state]);
    $(`#legend b[data-s=${state}]`).textContent = counts.some(missing) ? '–' : int(counts.reduce((a, b) => a + b, 0));
  }
  const sizes = [...new Set(snap.engines.map(cellSize))].sort((a, b) => a - b);
  const range = sizes.length > 1 ? `${sizes[0]} to ${sizes.at(-1)}` : sizes[0];
  $('#legend-note').textContent = `a cell is ${range === 1 ? 'one block' : `${range} blocks`}`;
  drawLinks();
}

const numCells = engine => engine.kv.map?.num_cells || Math.min(MAX_CELLS, engine.kv.num_blocks) || 1;
const cellSize = engine => Math.round(engine.kv.map?.blocks_per_cell || engine.kv.num_blocks / numCells(engine));

function updatePool(engine) {
  const p = pools.get(engine.id), { kv } = engine;
  if (!p) return;
  const usage = engine.kv_cache_usage_perc;
  if (!missing(kv.used)) { p.from = p.to || kv; p.to = kv; p.t0 = performance.now(); }
  if (kv.map) p.cells = unpack(kv.map);
  const share = state => missing(kv[state]) ? '–' : pct(kv[state] / kv.num_blocks);
  const spoken = `KV cache of ${engine.id}: ${pct(usage)} in use, ${share('cached')} cached, ${share('free')} free`;
  p.canvas.setAttribute('aria-label', spoken);
  if (p.gauge) {
    p.gauge.textContent = `${pct(usage, usage > 0 && usage < .1 ? 1 : 0)} in use`;
    p.gauge.style.top = (1 - (usage || 0)) * 84 + 8 + '%';
    p.gauge.style.display = order === 'level' && !missing(usage) ? '' : 'none';
  }
  const card = $(`.eng[data-id="${engine.id}"]`);
  if (!card) return;
  card.classList.toggle('gone', !engine.is_alive);
  $('.eh em', card).textContent = engine.is_alive ? pct(usage) + ' in use' : 'not running';
  const [load, rate] = $$('.ef span', card), prefill = engine.role === 'prefill';
  const waiting = `, ${int(engine.num_requests_waiting)} waiting`;
  load.textContent = `${int(engine.num_requests_running)} running${waiting}`;
  rate.textContent = prefill ? `${short(engine.prompt_tokens_per_s)} tok/s in`
    : `${short(engine.generation_tokens_per_s)} tok/s out`;
}

// ---- drawing ----

// The level view: one grid of cells, coloured by which layer of water each lies in. Mean-zero waves keep areas exact.
function surfaces(kv, w, h, time) {
  const amp = calm.matches || h < 60 ? 0 : h / 75, n = 48;
  let cum = 0;
  return STATES.slice(0, -1).map((state, k) => {
    cum += kv[state] / kv.num_blocks;
    const room = Math.min(1, Math.min(cum, 1 - cum) * h / (amp * 2 || 1)), ys = [];
    for (let i = 0; i <= n; i++) {
      const x = i / n * w;
      ys.push(Math.sin(x * .021 + time * .8 + k * .5) * .6 + Math.sin(x * .0093 - time * .5 + k * .4) * .6);
    }
    const mean = ys.reduce((a, b) => a + b, 0) / ys.length;
    return ys.map((y, i) => [i / n * w, h - cum * h - (y - mean) * amp * room]);
  });
}

function unpack(map) { // "u120s14f3..." -> one letter per cell
  let out = '';
  for (const [, letter, count] of map.cells.matchAll(/([.cusf])(\d+)/g)) out += letter.repeat(+count);
  return out;
}

function drawPool(engine, p, now) {
  const w = p.canvas.clientWidth, h = p.canvas.clientHeight;
  if (!w || !p.to) return;
  const dpr = Math.min(2, devicePixelRatio || 1), width = Math.round(w * dpr), height = Math.round(h * dpr);
  if (p.canvas.width !== width || p.canvas.height !== height) { p.canvas.width = width; p.canvas.height = height; }
  const g = p.canvas.getContext('2d');
  g.setTransform(dpr, 0, 0, dpr, 0, 0);
  g.clearRect(0, 0, w, h);
  const cells = numCells(engine), cols = Math.max(1, Math.round(w / Math.sqrt(w * h / cells)));
  const rows = Math.ceil(cells / cols);
  const px = w / cols, py = h / rows, gap = px > 6.5 ? 1.4 : 1;
  if (order === 'level') drawLevel(g, p, { w, h, cols, rows, px, py, gap }, now);
  else {
    const paint = Object.fromEntries(STATES.map(state => [state, new Path2D()]));
    for (let i = 0; i < cells; i++) {
      paint[LETTER[p.cells?.[i]] || 'free'].rect(i % cols * px, Math.floor(i / cols) * py + gap, px - gap, py - gap);
    }
    for (const state of STATES) { g.fillStyle = colour[state]; g.fill(paint[state]); }
  }
}

function drawLevel(g, p, { w, h, cols, rows, px, py, gap }, now) {
  const k = Math.max(0, Math.min(1, (performance.now() - p.t0) / 500)), kv = { ...p.to };
  for (const state of STATES) kv[state] = p.from[state] + (p.to[state] - p.from[state]) * k;
  const grid = new Path2D();
  for (let c = 0; c < cols; c++) for (let r = 0; r < rows; r++) grid.rect(c * px, r * py + gap, px - gap, py - gap);
  const tops = surfaces(kv, w, h, now / 1000);
  const trace = (line, path) => line.forEach(([x, y], i) => i ? path.lineTo(x, y) : path.moveTo(x, y));
  STATES.forEach((state, i) => {
    const area = new Path2D();
    if (i < tops.length) trace(tops[i], area);
    else { area.moveTo(0, -9); area.lineTo(w, -9); }
    if (i) for (let j = tops[i - 1].length; j--;) area.lineTo(...tops[i - 1][j]);
    else { area.lineTo(w, h + 9); area.lineTo(0, h + 9); }
    g.save(); g.clip(area); g.fillStyle = colour[state]; g.fill(grid); g.restore();
  });
  const held = (kv.used + kv.shared + kv.filling) / kv.num_blocks;
  if (!held) return; // no water held: no surface to draw
  const line = new Path2D();
  trace(tops[2], line);
  g.strokeStyle = colour.line; g.lineWidth = 1.5; g.stroke(line);
}

function frame(now) { // ten frames a second are enough for water
  requestAnimationFrame(frame);
  if (now - lastDraw < 100 || !live.snap || document.hidden) return;
  lastDraw = now;
  for (const engine of live.snap.engines) { const p = pools.get(engine.id); if (p) drawPool(engine, p, now); }
}

export function readColours() {
  colour = Object.fromEntries(STATES.map(state => [state, css('--' + state)]));
  colour.line = css('--p50');
}

export function setOrder(name) {
  order = name;
  $$('input[name=order]').forEach(input => { input.checked = input.value === name; });
  if (live.snap) updateScene();
}
export const stopScene = () => spin?.pause();
export const flipOrder = () => setOrder(order === 'level' ? 'address' : 'level');
export const startScene = () => requestAnimationFrame(frame);
