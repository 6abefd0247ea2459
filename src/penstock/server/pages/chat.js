// The conversation: sends it whole with each message, streams the answer, and says what the answer cost.

import { $, $$, el, int, missing, ms, plural } from './dom.js';
import { SOURCE_NAME, live, spanName, spanVar } from './state.js';
import { routeView } from './cluster.js';
import { prefixView } from './requests.js';
import { chat, explain } from './source.js';

const talk = []; // {role, content}, as the API takes it
const explainers = new WeakMap(); // message element -> its toggle
let running = null;

function prose(box, text) { // paragraphs, `code` and ``` blocks; always text nodes, never HTML
  const parts = text.split(/```\w*\n?/).flatMap((part, i) => {
    if (i % 2) return [el('pre', {}, el('code', {}, part.replace(/\n$/, '')))];
    return part.split(/\n{2,}/).filter(p => p.trim()).map(p =>
      el('p', {}, p.trim().split(/`([^`\n]+)`/).map((t, k) => k % 2 ? el('code', {}, t) : t)));
  });
  box.replaceChildren(...parts);
}

function say(role, text) {
  const body = el('div'), message = el('div', { class: 'msg ' + role }, body);
  prose(body, text);
  $('#log').append(message);
  return { message, body };
}

function factsLine(message, facts) {
  const button = el('button', { class: 'link', 'aria-expanded': 'false' }, 'Explain');
  const flip = () => toggleExplain(message, facts.id, button);
  button.addEventListener('click', flip);
  message.append(el('div', { class: 'meta' },
    missing(facts.ttft) ? null
      : el('span', { title: 'Time to first token, measured here' }, 'TTFT ', el('b', {}, ms(facts.ttft))),
    missing(facts.tps) ? null : el('span', {}, el('b', {}, facts.tps.toFixed(1)), ' tok/s'),
    missing(facts.prompt) ? null : el('span', { title: 'Prompt tokens that were not computed again' },
      el('b', {}, `${int(facts.cached)}/${int(facts.prompt)}`), ' cached'),
    el('span', { title: 'Finish reason' }, el('b', {}, facts.finish)), facts.id ? button : null));
  if (facts.id) explainers.set(message, flip);
}

async function toggleExplain(message, id, button) {
  const old = $('.explain', message);
  if (old) { old.remove(); button.setAttribute('aria-expanded', 'false'); button.textContent = 'Explain'; return; }
  const x = await explain(id);
  button.setAttribute('aria-expanded', 'true');
  button.textContent = 'Close';
  message.append(x ? drawer(x) : el('div', { class: 'explain' }, 'The server does not remember this request.'));
  message.scrollIntoView({ block: 'nearest' });
}

function drawer(x) {
  const kinds = new Map();
  for (const s of x.spans) {
    const key = s.kind + (s.tier || ''), kind = kinds.get(key) || { span: s, seconds: 0, tokens: 0, steps: 0 };
    kind.seconds += s.end_s - s.start_s;
    kind.tokens += s.num_tokens || 0;
    kind.steps += 1;
    kinds.set(key, kind);
  }
  const parts = [...kinds.values()], wall = x.spans.length ? Math.max(...x.spans.map(s => s.end_s)) : null;
  const name = part => part.span.kind === 'load' ? `${SOURCE_NAME[part.span.tier]} load` : spanName(part.span);
  const tokens = part => part.tokens ? `${int(part.tokens)} tok` : '';
  const note = {
    queue: () => x.queue_reason, load: tokens, decode: tokens, transfer: part => [tokens(part), part.span.from && `by ${part.span.from}`].filter(Boolean).join(' '),
    prefill: part => `${tokens(part)} in ${plural(part.steps, 'step')}`,
  };
  return el('div', { class: 'explain' },
    el('h3', {}, 'Where the time went ', el('span', {}, ms(wall))),
    el('div', { class: 'where', role: 'img', 'aria-label': parts.map(p => `${name(p)} ${ms(p.seconds)}`).join(', ') },
      parts.map(p => el('i', { style: `flex:${1e6 * p.seconds} 1 0;background:var(${spanVar(p.span)})` }))),
    el('div', { class: 'rows' }, parts.flatMap(p => [
      el('i', { style: `background:var(${spanVar(p.span)})` }), name(p),
      el('span', {}, (note[p.span.kind] || tokens)(p)), el('b', {}, ms(p.seconds))])),
    el('div', { class: 'space' }), prefixView(x), routeView(x));
}

function emptyChat() {
  const ask = text => el('button', { class: 'btn', onclick: () => send(text) }, text);
  $('#log').replaceChildren(el('div', { class: 'hello' },
    el('p', {}, 'Ask the model something. Each answer comes with its times, and a reason for every cache miss.'),
    ask('Tell me a story about a small boat'), ask('What is a prefix cache?'), ask('Write a haiku about water')));
}

function settings() { // empty or odd fields are left to the server's defaults
  const number = id => {
    const text = $(id).value.trim().replace(',', '.');
    return text === '' || Number.isNaN(+text) ? undefined : +text;
  };
  return { temperature: number('#o-temp'), max_tokens: number('#o-max') };
}

async function send(text) {
  if (running) { running.abort(); return; }
  const log = $('#log');
  $('.hello', log)?.remove();
  talk.push({ role: 'user', content: text });
  say('user', text);
  const { message, body } = say('bot', '');
  body.classList.add('cursor');
  const stop = running = new AbortController();
  $('#b-send span').textContent = 'Stop';
  log.scrollTop = log.scrollHeight;

  const start = performance.now();
  let all = '', first = null, last = null, n = 0, id = null, end = null, failure = '', painting = 0;
  const paint = () => { // at most once a frame: a long answer is laid out anew each time
    painting = 0;
    const stick = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    prose(body, all);
    if (stick) log.scrollTop = log.scrollHeight;
  };
  try {
    const request = {
      model: live.hello?.model.id, messages: talk, ...settings(), stream: true, stream_options: { include_usage: true },
    };
    for await (const part of chat(request, stop.signal)) {
      if (part.id) id = part.id;
      else if (part.delta) {
        last = performance.now();
        first ??= last;
        n++;
        all += part.delta;
        painting ||= requestAnimationFrame(paint);
      } else end = part;
    }
  } catch (error) {
    if (error.name !== 'AbortError') failure = error.message || 'the connection was lost';
  }
  cancelAnimationFrame(painting);
  paint();
  body.classList.remove('cursor');
  if (failure) message.append(el('p', { class: 'fault' }, failure[0].toUpperCase() + failure.slice(1)));
  if (running === stop) { running = null; $('#b-send span').textContent = 'Send'; }
  // A turn that failed before its first word is not part of the conversation: it can be sent again.
  if (all) talk.push({ role: 'assistant', content: all }); else if (talk.at(-1)?.content === text) talk.pop();
  const made = end?.usage?.completion_tokens ?? n; // a delta may carry several tokens, or wait for a whole character
  if (!failure || all) factsLine(message, {
    id, ttft: first === null ? null : (first - start) / 1e3,
    tps: made > 1 && last > first ? (made - 1) / (last - first) * 1e3 : null,
    cached: end?.usage?.prompt_tokens_details?.cached_tokens, prompt: end?.usage?.prompt_tokens,
    finish: failure ? 'failed' : end?.finish || 'stopped by you',
  });
  log.scrollTop = log.scrollHeight;
}

export const stopAnswer = () => { if (!running) return false; running.abort(); return true; };
export const explainLast = () => {
  const message = $$('.msg').reverse().find(m => explainers.has(m));
  if (message) explainers.get(message)();
};

export function startChat() {
  const box = $('#message');
  box.addEventListener('input', () => { box.style.height = 'auto'; box.style.height = box.scrollHeight + 2 + 'px'; });
  box.addEventListener('keydown', event => {
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $('#ask').requestSubmit();
  });
  $('#ask').addEventListener('submit', event => {
    event.preventDefault();
    const text = box.value.trim();
    if (stopAnswer() || !text) return;
    box.value = '';
    box.style.height = 'auto';
    send(text);
  });
  $('#b-new').addEventListener('click', () => { stopAnswer(); talk.length = 0; emptyChat(); box.focus(); });
  emptyChat();
}
