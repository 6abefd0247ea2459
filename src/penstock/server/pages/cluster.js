// What lies between engines and below them: the router's decisions, KV on its way from engine to engine, tiers.
// Shown only where there is more than one engine, or a tier.

import { $, el, int, missing, ms, pct, rate, short, svg } from './dom.js';
import { SOURCE_NAME, live } from './state.js';

const bar = (name, kind, share, text, title, full) => el('li', { title, class: full ? 'wide' : '' },
  el('span', { class: kind }, name), el('div', { class: 'bar' }, el('i', { style: `width:${100 * share}%` })),
  el('span', {}, text));

export function updateFleet() {
  const { snap } = live, tiers = Object.entries(snap.tiers);
  $('#fleet').hidden = !snap.router && !snap.handoffs && !tiers.length;
  $('#routes-card').hidden = !snap.router;
  $('#xfer-card').hidden = !snap.handoffs;
  $('#tiers-card').hidden = !tiers.length;
  if (snap.router) drawRoutes(snap.router);
  if (snap.handoffs) drawHandOffs(snap);
  if (tiers.length) drawTiers(tiers);
}

const way = d => d.prefill_at.length ? `${d.prefill_at[0]} → ${d.engine}` : d.engine;

function drawRoutes(router) {
  $('#router-sub').textContent = `${short(router.decisions_per_s)} per s`;
  const rows = router.decisions.map(d => el('tr', {},
    el('td', { class: 'mono', title: d.request_id }, d.request_id.slice(-8)), el('td', { class: 'route' }, way(d)),
    el('td', { class: 'why-cell' }, d.reason + (d.num_tries > 1 ? `, try ${d.num_tries}` : '')),
    el('td', { class: 'num' }, ms(d.predicted_ttft_s)), el('td', { class: 'num' }, ms(d.ttft_s))));
  if (!rows.length) rows.push(el('tr', {}, el('td', { colspan: 5, class: 'empty' }, 'No request so far.')));
  $('#decisions tbody').replaceChildren(...rows);
}

function drawHandOffs({ links, handoffs: h }) {
  const speed = links.reduce((sum, link) => sum + link.bytes_per_s, 0);
  $('#xfer-sub').textContent = `${rate(speed)}, ${int(h.num_receiving)} in flight`;
  const most = Math.max(...links.map(link => link.bytes_per_s), 1);
  const rows = links.map(link => bar(`${link.src} → ${link.dst}`, 'nm', link.bytes_per_s / most, rate(link.bytes_per_s),
    `${link.scheme}, ${link.gigabytes_per_s.toFixed(2)} GB/s while it sends, ${pct(link.overlap)} of that under steps, `
    + `${int(link.num_transfers)} transfers, ${int(link.num_failed)} failed`, true));
  if (!rows.length) rows.push(el('li', { class: 'empty block' }, 'Nothing was handed over so far.'));
  $('#links-list').replaceChildren(...rows);
  const exposed = links.filter(link => !missing(link.exposed_s));
  const mean = exposed.length ? exposed.reduce((sum, link) => sum + link.exposed_s, 0) / exposed.length : null;
  $('#handoffs').replaceChildren(...[
    ['Prompts handed over', int(h.num_received)], ['Failed tries', int(h.num_failed)],
    ['Computed where decoded', int(h.num_local)], ['Tokens received', short(h.tokens_received)],
    ['Not hidden by steps, per transfer', ms(mean)],
  ].flatMap(([name, text]) => [name, el('b', {}, text)]));
}

function drawTiers(tiers) {
  const saved = tiers.reduce((sum, [, tier]) => sum + tier.saved_seconds_total, 0);
  $('#tiers-sub').textContent = `${ms(Math.abs(saved))} of computing ${saved < 0 ? 'lost' : 'saved'}`;
  $('#tiers').replaceChildren(...tiers.flatMap(([name, tier]) => {
    const share = tier.capacity_blocks ? tier.used_blocks / tier.capacity_blocks : 0;
    const size = `${short(tier.used_blocks)}${tier.capacity_blocks ? ` of ${short(tier.capacity_blocks)}` : ''} blocks`;
    const row = bar(SOURCE_NAME[name] || name, 'nm', share, size, tier.state, false);
    row.querySelector('.bar i').style.background = `var(--${name})`;
    const facts = `${int(tier.hit_blocks_total)} hits, ${rate(tier.read_bytes_per_s)} read, `
      + `${rate(tier.written_bytes_per_s)} written`;
    return [row, el('li', { class: 'note' }, tier.state === 'on' ? facts : `${facts}; ${tier.state}`)];
  }));
}

// Arrows between the engines of the scene: wide where much flows, with what flows written beside them.
export function drawLinks() {
  const box = $('#links'), { links } = live.snap ?? {};
  if (!box || !links) return;
  const picture = $('svg', box), b = box.getBoundingClientRect();
  if (!b.width) return;
  const drawn = links.filter(link => [link.src, link.dst].every(id => $(`.eng[data-id="${id}"]`)));
  const tall = matchMedia('(max-width: 900px)').matches;
  const key = JSON.stringify([b.width, b.height, tall, drawn.map(link => [link.src, link.dst])]);
  const at = id => {
    const r = $(`.eng[data-id="${id}"] .bore`).getBoundingClientRect();
    return tall ? r.left + r.width / 2 - b.left : r.top + r.height / 2 - b.top;
  };
  if (picture.dataset.key !== key) {
    picture.dataset.key = key;
    picture.textContent = '';
    for (const link of drawn) {
      const a = at(link.src), z = at(link.dst), w = b.width + 4, h = b.height;
      const d = tall ? `M${a} 0C${a} ${h * .5} ${z} ${h * .5} ${z} ${h}`
        : `M-6 ${a}C${w * .5} ${a} ${w * .5} ${z} ${w} ${z}`;
      const flow = svg('path', { d, class: 'flow', 'data-l': `${link.src} ${link.dst}` });
      flow.append(svg('title'));
      picture.append(svg('path', { d, class: 'bed' }), flow);
    }
  }
  for (const link of drawn) {
    const flow = $(`[data-l="${link.src} ${link.dst}"]`, picture), busy = link.bytes_per_s > 0;
    flow.style.strokeWidth = busy ? 2 + Math.min(6, Math.log10(1 + link.bytes_per_s / 1e6) * 2) : 0;
    flow.style.opacity = busy ? .9 : 0;
    flow.firstChild.textContent = `${link.src} to ${link.dst}: ${rate(link.bytes_per_s)}, ${link.num_in_flight} in flight`;
  }
  const speed = drawn.reduce((sum, link) => sum + link.bytes_per_s, 0), waiting = live.snap.handoffs?.num_receiving;
  const exposed = drawn.map(link => link.exposed_s).filter(x => !missing(x));
  $('.flow-facts', box).replaceChildren(
    el('div', {}, el('b', {}, rate(speed))), el('div', {}, `${int(waiting)} in flight`),
    exposed.length ? el('div', {}, `${ms(Math.max(...exposed))} exposed`) : '');
}

// Why one request went where, of /explain.
export function routeView({ route }) {
  if (!route) return null;
  const facts = [
    ['Decoded by', route.engine], ['Prompt computed by', route.prefill_at[0] || route.engine],
    ['TTFT, predicted', ms(route.predicted_ttft_s)], ['TTFT at the router', ms(route.ttft_s)],
    ...route.runner_ups.map(next => [`Next best, ${next.engine}`, short(next.score)]),
  ];
  return el('div', { class: 'route-why' }, el('h3', {}, 'Route ', el('span', {}, route.reason)),
    el('div', { class: 'kv-list' }, facts.flatMap(([name, text]) => [name, el('b', {}, text)])));
}
