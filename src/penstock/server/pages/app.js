// The page: joins the source of data to the views, and owns what belongs to none of them (header, theme, keys).

import { $, $$, el, since } from './dom.js';
import { live } from './state.js';
import { hasKey, listen, setKey } from './source.js';
import { buildScene, flipOrder, readColours, setOrder, startScene, stopScene, updateScene } from './scene.js';
import { buildCharts, buildFlow, buildSpec, updateCharts, updateFlow, updateSpec } from './charts.js';
import { drawLinks, updateFleet } from './cluster.js';
import { forgetOpen, openRequest, startRequests, toggle, updateRequests } from './requests.js';
import { explainLast, startChat, stopAnswer } from './chat.js';

const SCHEMA = 1, MAX_ROWS = 480;
const params = new URLSearchParams(location.search);
let fresh = false; // the first snapshot after a hello draws everything

function onHello(hello) {
  live.hello = hello;
  live.series = structuredClone(hello.series.columns);
  live.snap = null;
  forgetOpen();
  fresh = true;
  $('#f-model').textContent = hello.model.id;
  $('#f-device').textContent = hello.device.name;
  document.title = `${hello.model.id} · penstock`;
  $('#f-set').textContent = `${hello.config.filter(isSet).length} set`;
  $('#newer').hidden = hello.schema <= SCHEMA;
  document.body.classList.toggle('one-engine', hello.engines.length === 1);
  document.body.classList.remove('no-data');
  drawConfig();
  buildScene();
  buildCharts();
  buildFlow();
  buildSpec();
}

function onSnapshot(snap) {
  snap.requests ??= live.snap?.requests ?? []; // left out of every second snapshot: the table draws at 1 Hz
  live.snap = snap;
  if (!(live.series.ts.at(-1) >= snap.series.ts)) { // the first snapshot repeats the newest row of the hello
    for (const [name, column] of Object.entries(live.series)) {
      column.push(snap.series[name] ?? null);
      if (column.length > MAX_ROWS) column.shift();
    }
  }
  $('#f-uptime').textContent = since(snap.uptime_s);
  if (moved(snap)) buildScene();
  updateScene();
  if (fresh || snap.seq % 2 === 0) { updateFleet(); updateCharts(); updateFlow(); updateSpec(); updateRequests(); }
  fresh = false;
}

function moved(snap) { // did engines change their role since they were drawn?
  const role = new Map(snap.engines.map(engine => [engine.id, engine.role]));
  const changed = live.hello.engines.filter(engine => role.get(engine.id) !== engine.role);
  for (const engine of changed) engine.role = role.get(engine.id);
  return changed.length > 0;
}

function onState(state, why) { // old numbers stay, dimmed
  $('#live').classList.toggle('off', state !== 'live');
  $('#live span').textContent = { live: 'live', retrying: 'retrying', stopped: 'stopped', locked: 'locked' }[state];
  $('#live').title = why;
  document.body.classList.toggle('stale', state !== 'live');
  if (state !== 'live') stopScene();
  $('#waiting').textContent = why ? why[0].toUpperCase() + why.slice(1) + '.' : '';
  if (state === 'locked') {
    $('#key-why').textContent = hasKey() ? 'The server did not accept that key.'
      : 'This server was started with --api-key. The key stays in this tab.';
    $('#key').showPopover();
    $('#key-text').focus();
  }
}

// ---- configuration ----
const isSet = item => item.origin !== 'default' && item.origin !== 'auto';

function drawConfig() {
  if (!live.hello) return;
  const wanted = $('#config-find').value.toLowerCase();
  const words = c => `${c.name} ${c.value} ${c.origin} ${c.note || ''}`.toLowerCase();
  const rows = live.hello.config.filter(c => words(c).includes(wanted));
  $('#config-table tbody').replaceChildren(...rows.map(c => el('tr', {},
    el('td', { class: 'mono' }, c.name), el('td', { class: 'mono value' }, String(c.value)),
    el('td', {}, el('span', { class: 'origin' + (isSet(c) ? ' set' : '') }, c.origin)), el('td', {}, c.note || ''))));
}

// ---- theme, tabs, keys ----
function theme(name) {
  document.documentElement.dataset.theme = name;
  try { localStorage.setItem('penstock-theme', name); } catch { /* private window */ }
  readColours();
  if (live.hello) { buildCharts(); updateCharts(); }
}
const flipTheme = () => theme(document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark');

function tab(name) {
  document.body.dataset.tab = name;
  for (const button of $$('.tabs button')) {
    if (button.dataset.go === name) button.setAttribute('aria-current', 'page');
    else button.removeAttribute('aria-current');
  }
  if (live.snap) { updateScene(); updateCharts(); updateFlow(); }
}

const KEYS = {
  '/': () => { tab('chat'); $('#message').focus(); },
  t: flipTheme,
  g: () => $('#config').togglePopover(),
  '?': () => $('#keys').togglePopover(),
  m: flipOrder,
  r: () => { tab('requests'); $('#reqs tr.r')?.focus(); },
  e: () => { tab('chat'); explainLast(); },
};
document.addEventListener('keydown', event => {
  const typing = event.target.matches('input:not([type=radio]), textarea');
  if (event.key === 'Escape') {
    if (stopAnswer()) return;
    if (typing) event.target.blur(); else if (openRequest()) toggle(openRequest());
    return;
  }
  if (typing || event.metaKey || event.ctrlKey || event.altKey || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});

$('#b-theme').addEventListener('click', flipTheme);
$('#config-find').addEventListener('input', drawConfig);
$('#key-form').addEventListener('submit', event => {
  event.preventDefault();
  const box = $('#key-text');
  if (!box.value.trim()) return;
  setKey(box.value);
  box.value = '';
  $('#key').hidePopover();
});
$('#live').addEventListener('click', () => { if ($('#live span').textContent === 'locked') $('#key').showPopover(); });
$$('.tabs button').forEach(button => button.addEventListener('click', () => tab(button.dataset.go)));
$$('input[name=order]').forEach(input => input.addEventListener('change', () => setOrder(input.value)));
addEventListener('resize', () => { if (live.snap) { updateFlow(); drawLinks(); } });

// ---- start ----
const saved = (() => { try { return localStorage.getItem('penstock-theme'); } catch { return null; } })();
theme(params.get('theme') || saved || (matchMedia('(prefers-color-scheme: light)').matches ? 'light' : 'dark'));
tab(params.get('tab') || 'chat');
setOrder(params.get('order') || 'level');
startChat();
startRequests();
startScene();
listen(onHello, onSnapshot, onState);
