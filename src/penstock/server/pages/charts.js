// Trends and causes: four line charts over four minutes, the flow of prompt tokens by source, drafts by position.
// uPlot draws the charts and nothing else does. Null is a gap, never a zero.
/* global uPlot */

import { $, $$, css, el, int, missing, ms, pct, short, svg } from './dom.js';
import { SOURCES, SOURCE_NAME, live } from './state.js';

const WINDOW_S = 240;
const charts = [];

function mix(a, b, k) { // two #rrggbb colours, opaque result: areas that overlap stay exact
  const parts = text => [1, 3, 5].map(i => parseInt(text.slice(i, i + 2), 16));
  const [u, v] = [parts(a), parts(b)];
  return `rgb(${u.map((x, i) => Math.round(x * k + v[i] * (1 - k))).join()})`;
}
function nice(x) { // the next round number above x
  const m = 10 ** Math.floor(Math.log10(x || 1));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15].map(k => k * m).find(k => k >= x * 1.02);
}

export function buildCharts() {
  for (const chart of charts.splice(0)) { chart.plot.destroy(); chart.observer.disconnect(); }
  const lines = key => ['p50', 'p95', 'p99'].map(q => (
    { key: `${key}_${q}`, name: q, var: `--${q}`, width: q === 'p95' ? 2 : 1.5, dash: q === 'p99' ? [2, 3] : null }));
  build('#c-ttft', 'TTFT', 'time to first token', lines('time_to_first_token_seconds'), ms, .01);
  build('#c-itl', 'ITL', 'time between tokens', lines('inter_token_latency_seconds'), ms, .001);
  build('#c-in', 'Tokens in', 'prompt, per second', [
    { key: 'prompt_tokens_per_s', name: 'all', var: '--compute', fill: .5, rest: 'computed' },
    { key: 'prompt_tokens_cached_per_s', name: 'cached', var: '--device', fill: .55 }], short, 10);
  build('#c-out', 'Tokens out', 'per second', [
    { key: 'generation_tokens_per_s', name: 'now', var: '--decode', fill: .3, width: 2 }], short, 10);
}

function build(where, title, sub, defs, format, least) {
  const values = el('span', { class: 'vals' }, defs.map(d => el('span', {},
    el('i', { class: 'ln' + (d.dash ? ' dash' : ''), style: `border-color:var(${d.var})` }),
    d.rest || d.name, el('b'))));
  const box = el('div', { class: 'plot', role: 'img' });
  $(where).replaceChildren(el('figcaption', {}, el('h2', {}, title), el('span', { class: 'sub' }, sub), values), box);
  const chart = { defs, values, box, format, title: `${title}, ${sub}` };
  chart.plot = new uPlot(options(chart, least), columns(chart), box);
  chart.observer = new ResizeObserver(() => {
    if (box.clientWidth) chart.plot.setSize({ width: box.clientWidth, height: box.clientHeight });
  });
  chart.observer.observe(box);
  charts.push(chart);
  write(chart);
}

function options(chart, least) {
  const { defs, box, format } = chart, muted = css('--muted'), line = css('--line'), panel = css('--panel');
  const font = '11px Inter, system-ui, sans-serif';
  const tick = v => format === ms ? (v >= 1 ? +v.toFixed(1) + ' s' : +(v * 1e3).toFixed(1) + ' ms')
    : v >= 1000 ? +(v / 1000).toFixed(1) + 'k' : String(+v.toFixed(1));
  let top = 0;
  const yRange = (_, low, high) => { // grows at once, shrinks late: nothing jumps
    const want = nice(Math.max(high || 0, least));
    if (want > top || want < top * .55) top = want;
    return [0, top];
  };
  const times = [240, 180, 120, 60, 0], names = ['', '−3 min', '−2 min', '−1 min', 'now'];
  return {
    width: Math.max(200, box.clientWidth), height: box.clientHeight || 132,
    legend: { show: false }, padding: [8, 16, 0, 0],
    cursor: { sync: { key: 'penstock' }, y: false, drag: { x: false, y: false }, points: { size: 6 } },
    scales: { x: { time: false, range: (_, low, high) => [(high || 0) - WINDOW_S, high || 0] }, y: { range: yRange } },
    axes: [
      {
        stroke: muted, font, size: 22, gap: 4, grid: { show: false }, ticks: { show: false },
        splits: u => times.map(s => u.scales.x.max - s), values: () => names,
      },
      {
        stroke: muted, font, size: 50, gap: 6, grid: { stroke: line, width: 1 }, ticks: { show: false }, space: 26,
        values: (_, splits) => splits.map(v => v ? tick(v) : '0'),
      }],
    series: [{}, ...defs.map(d => ({
      stroke: css(d.var), width: d.width || 1.5, dash: d.dash || undefined, spanGaps: false, points: { show: false },
      fill: d.fill ? mix(css(d.var), panel, d.fill) : undefined,
    }))],
    hooks: { setCursor: [u => write(chart, u.cursor.idx)] },
  };
}

const columns = chart => [live.series.ts, ...chart.defs.map(d => live.series[d.key])];

function write(chart, index) { // the numbers in the caption: under the cursor, else now
  const i = index ?? live.series.ts.length - 1, cells = $$('b', chart.values);
  chart.defs.forEach((d, k) => {
    let value = live.series[d.key][i];
    if (d.rest && !missing(value)) value -= live.series[chart.defs[k + 1].key][i] || 0;
    cells[k].textContent = chart.format(value);
  });
  if (missing(index)) chart.box.setAttribute('aria-label', `${chart.title}: ${chart.values.textContent}`);
}

export function updateCharts() {
  for (const chart of charts) {
    chart.plot.setData(columns(chart));
    const empty = chart.defs.every(d => live.series[d.key].every(missing));
    chart.box.classList.toggle('blank', empty);
    if (chart.plot.cursor.idx === null || chart.plot.cursor.left < 0) write(chart);
  }
}

// ---- where prompt tokens came from ----
let flow = null;

export function buildFlow() {
  const picture = svg('svg', { role: 'img' });
  $('#flow').replaceChildren(picture);
  flow = { picture, rows: {}, head: svg('text', { x: 0, y: 12 }) };
  for (const source of SOURCES) {
    const fill = `var(--${source})`;
    const row = {
      path: svg('path', { fill, 'fill-opacity': .36 }), from: svg('rect', { fill, width: 6 }),
      bar: svg('rect', { fill, width: 6, rx: 1.5 }), name: svg('text'), detail: svg('text', { class: 'm' }),
    };
    flow.rows[source] = row;
    picture.append(...Object.values(row));
  }
  picture.append(flow.head);
}

export function updateFlow() {
  const data = live.snap.prompt_tokens_by_source, width = $('#flow').clientWidth;
  if (!width) return;
  const total = SOURCES.reduce((sum, source) => sum + (data[source] || 0), 0), { tiers } = live.snap;
  const shown = SOURCES.filter(s => s === 'compute' || s === 'device' || !missing(data[s]));
  const height = 22 + Math.max(118, 46 * shown.length), bed = Math.min(128, height - 78);
  flow.picture.setAttribute('viewBox', `0 0 ${width} ${height}`);
  flow.picture.style.height = height + 'px';
  const x1 = width - Math.min(210, width * .46) - 12, step = (height - 22) / shown.length;
  let y = 20 + (height - 20 - bed) / 2;
  for (const source of SOURCES) {
    const row = flow.rows[source], on = shown.includes(source);
    for (const node of Object.values(row)) node.style.display = on ? '' : 'none';
    if (!on) continue;
    const share = total ? (data[source] || 0) / total : 0, thick = total ? Math.max(1, share * bed) : 1;
    const middle = 20 + step * (shown.indexOf(source) + .5); // a thick one keeps off the edges
    const center = Math.min(height - 2 - thick / 2, Math.max(20 + thick / 2, middle)), a = center - thick / 2, m = x1 * .5;
    row.path.style.display = total ? '' : 'none';
    row.path.setAttribute('d',
      `M6 ${y}C${m} ${y} ${m} ${a} ${x1} ${a}V${a + thick}C${m} ${a + thick} ${m} ${y + thick} 6 ${y + thick}Z`);
    place(row.from, 0, y, thick);
    place(row.bar, x1, a, thick);
    const tier = tiers[source];
    row.name.setAttribute('x', x1 + 14); row.name.setAttribute('y', center - 2);
    row.name.textContent = `${SOURCE_NAME[source]}  ${total ? pct(share) : '–'}`;
    row.detail.setAttribute('x', x1 + 14); row.detail.setAttribute('y', center + 12);
    row.detail.textContent = total ? `${short(data[source] / data.window_s)} tok/s` : '';
    if (tier?.capacity_blocks) row.detail.textContent += ` · ${pct(tier.used_blocks / tier.capacity_blocks)} full`;
    y += thick;
  }
  const kept = total ? 1 - (data.compute || 0) / total : 0;
  flow.head.textContent = total ? `${short(total / data.window_s)} tok/s in, ${pct(kept)} not recomputed`
    : 'No prompts in this time';
  flow.picture.setAttribute('aria-label',
    total ? shown.map(s => `${SOURCE_NAME[s]} ${pct((data[s] || 0) / total)}`).join(', ') : 'no prompts');
  $('#flow-sub').textContent = missing(data.window_s) ? '' : `last ${Math.round(data.window_s)} s`;
}

function place(rect, x, y, height) {
  rect.setAttribute('x', x); rect.setAttribute('y', y); rect.setAttribute('height', height);
}

// ---- drafts ----
export function buildSpec() {
  const { spec } = live.hello, box = $('#spec');
  $('#spec-card').hidden = !spec;
  $('.pair').classList.toggle('alone', !spec);
  box.textContent = '';
  if (!spec) return;
  const tubes = [...Array(spec.max_draft_tokens)].map((_, i) =>
    el('div', { class: 'tube' }, el('b'), el('div', { class: 'glass' }, el('i')), `token ${i + 1}`));
  box.append(el('div', { class: 'tubes' }, tubes), el('div', { class: 'kv-list' },
    'Tokens per step', el('b', { id: 'sp-len' }), 'Speed against no drafts', el('b', { id: 'sp-gain' }),
    'Requests drafting now', el('b', { id: 'sp-on' })));
}

export function updateSpec() {
  const data = live.snap.spec_decode;
  if (!data || !live.hello.spec) return;
  $('#spec-sub').textContent = `${live.hello.spec.method}, by position`;
  $$('.tube', $('#spec')).forEach((tube, i) => {
    const rate = data.acceptance_rate_per_pos[i];
    $('b', tube).textContent = pct(rate);
    $('.glass i', tube).style.height = 100 * (rate || 0) + '%';
  });
  $('#sp-len').textContent = missing(data.mean_accepted_length) ? '–' : data.mean_accepted_length.toFixed(2);
  $('#sp-gain').textContent = missing(data.measured_speedup) ? '–' : data.measured_speedup.toFixed(2) + '×';
  $('#sp-on').textContent = `${int(data.num_requests_drafting)} of ${int(live.snap.totals.num_requests_running)}`;
}
