// What the views share: the newest data from the server, and the words and colours that all of them use.
// Field names are those of docs/page.md; nothing here knows where a number was measured.

export const live = {
  hello: null, // once per connection
  snap: null, // the newest snapshot; `requests` are those of the last one that had them
  series: { ts: [] }, // columns of the charts
};

export const STATES = ['shared', 'used', 'filling', 'cached', 'free']; // from the bed of the reservoir up
export const STATE_NAME = {
  shared: 'Shared', used: 'In use', filling: 'Being filled', cached: 'Cached, reclaimable', free: 'Free',
};
export const STATE_TIP = {
  shared: 'Held by two or more running requests',
  used: 'Held by one running request',
  filling: 'Space taken; keys and values arrive or are computed now',
  cached: 'No request holds it; serves a prefix hit until the space is needed',
  free: 'Empty',
};
export const LETTER = { '.': 'free', c: 'cached', u: 'used', s: 'shared', f: 'filling' };

export const REASON = {
  capacity: 'no free block', budget: 'step full', slots: 'all places taken', shared_block: 'shared block',
  preempted: 'preempted', kv_load: 'tier load', kv_transfer: 'transfer', grammar: 'grammar', media: 'images',
};

export const SOURCES = ['device', 'peer', 'host', 'disk', 'remote', 'compute'];
export const SOURCE_NAME = {
  device: 'Device', peer: 'Other engine', host: 'Host', disk: 'Disk', remote: 'Remote', compute: 'Recompute',
};

const SPAN = {
  queue: ['--queue', 'Queue'], load: ['--host', 'Tier load'], prefill: ['--compute', 'Prefill'],
  transfer: ['--transfer', 'Transfer'], decode: ['--decode', 'Decode'], preempted: ['--bad', 'Preempted'],
};
export const spanVar = span => span.kind === 'load' ? `--${span.tier || 'host'}` : (SPAN[span.kind] || SPAN.queue)[0];
export const spanName = span => (SPAN[span.kind] || [0, span.kind])[1];

export const MISS = {
  first_seen: 'First seen', diverged: 'Prompt differs', evicted: 'Was evicted', tail: 'The uncached tail starts',
  cheaper: 'Cheaper to compute', disabled: 'Cache is off',
};
