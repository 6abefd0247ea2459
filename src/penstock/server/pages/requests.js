// Single requests: the table with its small timelines, and one request's record as a Gantt chart and a prompt bar.

import { $, $$, el, int, missing, ms, pct } from './dom.js';
import { MISS, SOURCE_NAME, live, spanName, spanVar } from './state.js';
import { routeView } from './cluster.js';
import { explain } from './source.js';

const STATE_VAR = {
  waiting: '--queue', loading: '--host', prefill: '--compute', transfer: '--transfer', decode: '--decode',
  finished: '--line-2', aborted: '--bad',
};
const NUM_SHOWN = 12, TABLE_S = 12;
let held = false, filter = 'all', openId = null, showAll = false;

const RANK = { waiting: 0, loading: 0, finished: 2, aborted: 2 }; // everything else runs
const rank = state => RANK[state] ?? 1;
const done = r => rank(r.state) === 2;

function sorted() {
  const wanted = r => filter === 'all' || ['waiting', 'running', 'finished'][rank(r.state)] === filter;
  return live.snap.requests.filter(wanted).sort((a, b) =>
    rank(a.state) - rank(b.state) || (done(a) ? b.finish_ts - a.finish_ts : a.arrival_ts - b.arrival_ts));
}

export function updateRequests() {
  const { snap } = live, body = $('#reqs tbody');
  const counts = `${int(snap.totals.num_requests_waiting)} waiting, ${int(snap.totals.num_requests_running)} running`;
  $('#req-sub').textContent = counts + (held ? ', order held while you point' : '');
  if (held) { // a row must not move away from under the pointer
    const now = new Map(snap.requests.map(r => [r.request_id, r]));
    for (const tr of $$('tr.r', body)) if (now.has(tr.dataset.id)) fill(tr, now.get(tr.dataset.id));
    return;
  }
  const all = sorted(), cut = showAll ? all : all.slice(0, NUM_SHOWN);
  if (openId && !cut.some(r => r.request_id === openId)) {
    const open = snap.requests.find(r => r.request_id === openId);
    if (open) cut.push(open);
  }
  const focus = document.activeElement?.closest?.('tr.r')?.dataset.id;
  const rows = new Map($$('tr.r', body).map(tr => [tr.dataset.id, tr])), keep = $('tr.detail', body), next = [];
  for (const r of cut) {
    const tr = rows.get(r.request_id) || row(r);
    fill(tr, r);
    next.push(tr);
    if (openId === r.request_id) next.push(keep && keep.dataset.id === openId ? keep : detail(r.request_id));
  }
  if (!next.length) {
    const text = 'No requests here. Send one from the chat.';
    next.push(el('tr', {}, el('td', { colspan: numColumns(), class: 'empty' }, text)));
  }
  const same = next.length === body.children.length && next.every((tr, i) => body.children[i] === tr);
  if (!same) body.replaceChildren(...next);
  $$('tr.r', body).forEach((tr, i) => { tr.tabIndex = (focus ? tr.dataset.id === focus : i === 0) ? 0 : -1; });
  if (focus) $$('tr.r', body).find(tr => tr.dataset.id === focus)?.focus({ preventScroll: true });
  const open = $('tr.detail', body);
  if (open) open.firstChild.colSpan = numColumns(); // fewer on a phone
  if (open && !open.dataset.final) drawDetail(open, openId);
  const more = $('#b-more');
  more.hidden = all.length <= NUM_SHOWN;
  more.textContent = showAll ? 'Show fewer' : `Show all ${all.length}`;
}

const numColumns = () => $$('#reqs th').filter(th => th.offsetParent).length || 8;

const row = r => el('tr', { class: 'r', 'data-id': r.request_id, tabindex: -1, 'aria-expanded': 'false' },
  el('td', {}, el('span', {}, el('i'), el('span'))),
  el('td', { class: 'mono', title: r.request_id }, r.request_id.slice(-8)),
  el('td', { class: 'num' }), el('td', { class: 'num' }),
  el('td', {}, el('span', { class: 'cbar' }, el('i')), el('span')),
  el('td', { class: 'num' }), el('td'), el('td', { class: 'tl' }, el('div', { class: 'mini' })));

function fill(tr, r) {
  const [state, , age, prompt, cached, out, engine, line] = tr.children, { snap } = live, mark = state.firstChild;
  tr.classList.toggle('fin', done(r));
  tr.classList.toggle('open', openId === r.request_id);
  tr.setAttribute('aria-expanded', openId === r.request_id);
  mark.className = 'st ' + r.state;
  mark.firstChild.style.background = r.state === 'waiting' ? '' : `var(${STATE_VAR[r.state]})`;
  mark.lastChild.textContent = r.state === 'finished' ? r.finish_reason : r.state;
  age.textContent = Math.max(0, (r.finish_ts || snap.ts) - r.arrival_ts).toFixed(1) + ' s';
  prompt.textContent = int(r.prompt_tokens);
  const hit = missing(r.cached_tokens) ? null : r.prompt_tokens ? r.cached_tokens / r.prompt_tokens : 0;
  cached.firstChild.firstChild.style.width = 100 * (hit || 0) + '%';
  cached.lastChild.textContent = pct(hit);
  out.textContent = int(r.generation_tokens);
  engine.textContent = r.engine;
  const end = snap.ts, start = end - TABLE_S, share = t => 100 * (t - start) / TABLE_S;
  line.firstChild.replaceChildren(...r.spans.filter(s => (s.end_ts ?? end) > start).map(s => {
    const a = Math.max(start, s.start_ts), b = Math.max(a, Math.min(end, s.end_ts ?? end));
    return el('i', { style: `left:${share(a)}%;width:${share(b) - share(a)}%;background:var(${spanVar(s)})` });
  }));
}

export function toggle(id) {
  openId = openId === id ? null : id;
  held = false;
  updateRequests();
}
export const openRequest = () => openId;
export function forgetOpen() { openId = null; }

function detail(id) {
  const tr = el('tr', { class: 'detail', 'data-id': id }, el('td', { colspan: numColumns() }));
  drawDetail(tr, id).then(() => { if (openId === id) tr.scrollIntoView({ block: 'nearest' }); });
  return tr;
}

async function drawDetail(tr, id) {
  const record = await explain(id), cell = tr.firstChild;
  if (record) cell.replaceChildren(gantt(record));
  else if (!cell.firstChild) cell.append(el('p', { class: 'empty' }, 'The server does not remember this request.'));
  if (record?.finish_reason) tr.dataset.final = 'yes'; // nothing about it changes any more
}

function gantt(x) {
  const side = el('div', { class: 'side' },
    el('div', { class: 'kv-list' },
      'Time to first token', el('b', {}, ms(x.time_to_first_token_s)),
      'Output', el('b', {}, x.tokens_per_s ? `${x.tokens_per_s.toFixed(1)} tok/s` : '–'),
      'Finish', el('b', {}, x.finish_reason || 'still running')),
    x.queue_reason ? el('p', { class: 'why queued' }, el('strong', {}, 'It waited'), sentence(x.queue_reason)) : null,
    prefixView(x), routeView(x));
  const none = el('p', { class: 'empty' }, 'No timeline: the engine sent none.');
  return el('div', { class: 'gantt' }, x.spans.length ? lanes(x) : none, side);
}

function lanes(x) {
  const end = Math.max(...x.spans.map(s => s.end_s), 1e-6), byLane = new Map(), first = x.time_to_first_token_s;
  const several = live.hello.engines.length > 1;
  for (const s of x.spans) {
    const where = s.kind === 'load' ? SOURCE_NAME[s.tier] : s.from ? `from ${s.from}` : several && s.engine || '';
    const key = `${spanName(s)}|${where}`;
    byLane.set(key, [...byLane.get(key) || [], s]);
  }
  // Decode dwarfs all else: the first 40 % of the axis is the time to the first token, the rest is decode, each linear.
  const split = first && first / end < .3 ? .4 : null;
  const share = t => t <= first ? t / first * split : split + (t - first) / (end - first) * (1 - split);
  const at = t => 100 * (split ? share(t) : t / end), from = x => `left:${x}%`;
  const width = s => at(s.end_s) - at(s.start_s);
  const box = el('div', { class: 'lanes' });
  for (const [key, list] of byLane) {
    const [name, sub] = key.split('|'), tokens = list.reduce((sum, s) => sum + (s.num_tokens || 0), 0);
    const text = ms(list.reduce((sum, s) => sum + s.end_s - s.start_s, 0)) + (tokens ? `, ${int(tokens)} tok` : '');
    const last = at(list.at(-1).end_s);
    box.append(
      el('div', { class: 'lane-n' }, name, sub ? el('small', {}, sub) : null),
      el('div', { class: 'lane' },
        list.map(s => el('i', {
          style: `${from(at(s.start_s))};width:calc(${width(s)}% - 1px);background:var(${spanVar(s)})`,
          title: `${name}: ${ms(s.end_s - s.start_s)}${s.num_tokens ? `, ${int(s.num_tokens)} tokens` : ''}`,
        })),
        first ? el('b', { class: 'ft', style: `left:${at(first)}%;opacity:.5` }) : null,
        el('span', { style: last < 72 ? from(last) : `right:${100 - at(list[0].start_s)}%` }, text)));
  }
  const marks = [[0, '0'], split ? [100 * split, `first token ${ms(first)}`] : [50, ms(end / 2)], [100, ms(end)]];
  box.append(el('div'), el('div', { class: 'axis' }, marks.map(([p, text]) => el('span', { style: from(p) }, text))));
  if (split) box.append(el('div'), el('div', { class: 'axis end' }, 'two scales: before and after the first token'));
  return box;
}

export function prefixView(x) {
  const { prefix } = x, head = el('h3', {}, 'Prompt ', el('span', {}, `${int(x.prompt_tokens)} tokens`));
  if (!prefix) return el('div', {}, head, el('p', { class: 'empty' }, 'Not looked up in the cache yet.'));
  const { runs, miss } = prefix;
  const spoken = runs.map(r => `${SOURCE_NAME[r.source]} ${r.end - r.start}`).join(', ');
  const why = miss && `${MISS[miss.reason] || miss.reason} at token ${int(miss.at_token)}`;
  return el('div', {}, head,
    el('div', { class: 'prefix', role: 'img', 'aria-label': spoken },
      runs.map(r => el('i', {
        style: `flex:${r.end - r.start} 1 0;background:var(--${r.source})`,
        title: `${SOURCE_NAME[r.source]}: tokens ${int(r.start)} to ${int(r.end)}`,
      }))),
    el('div', { class: 'rows' }, runs.flatMap(r => [
      el('i', { style: `background:var(--${r.source})` }), SOURCE_NAME[r.source],
      el('span', {}, `${int(r.start)} to ${int(r.end)}`), el('b', {}, int(r.end - r.start))])),
    miss ? el('p', { class: 'why' }, el('strong', {}, why), sentence(miss.detail)) : null);
}

const sentence = text => text ? text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? '' : '.') : '';

export function startRequests() {
  const table = $('#reqs');
  table.addEventListener('click', event => { const tr = event.target.closest('tr.r'); if (tr) toggle(tr.dataset.id); });
  table.addEventListener('pointerenter', () => { held = true; });
  table.addEventListener('pointerleave', () => { held = false; });
  table.addEventListener('keydown', event => {
    const tr = event.target.closest?.('tr.r');
    if (!tr) return;
    if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); toggle(tr.dataset.id); return; }
    const list = $$('tr.r', table), i = list.indexOf(tr);
    const to = list[{ ArrowDown: i + 1, j: i + 1, ArrowUp: i - 1, k: i - 1, Home: 0, End: list.length - 1 }[event.key]];
    if (!to) return;
    event.preventDefault();
    event.stopPropagation();
    list.forEach(x => { x.tabIndex = -1; });
    to.tabIndex = 0;
    to.focus();
  });
  $('#b-more').addEventListener('click', () => { showAll = !showAll; updateRequests(); });
  $$('input[name=filter]').forEach(input => input.addEventListener('change', () => {
    filter = input.value;
    if (live.snap) updateRequests();
  }));
}
