#!lua name=valohai_v1
-- Atomic steps of the queue. All keys of one call share the group's hash tag.
-- Kept small: what needs no atomicity is done by plain commands.

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

-- KEYS: worker entry. ARGS: incarnation, ttl_ms, field, value, ...
-- Returns 1 when the entry belongs to the caller, 0 when another live process holds the name.
-- The group's roster (same hash tag) names who checked in, so that nobody has to scan the keyspace for workers.
local function heartbeat(keys, args)
  local holder = redis.call('HGET', keys[1], 'incarnation')
  if holder and holder ~= args[1] then return 0 end
  local fields = {'incarnation', args[1], 'seen_ms', tostring(now_ms())}
  for i = 3, #args do fields[#fields + 1] = args[i] end
  redis.call('HSET', keys[1], unpack(fields))
  redis.call('PEXPIRE', keys[1], tonumber(args[2]))
  local prefix, name = string.match(keys[1], '^(.-}:)worker:(.*)$')
  redis.call('SADD', prefix .. 'roster', name)
  return 1
end

local WINDOW = 12      -- ready jobs that are looked at
local MAX_PASSED = 8   -- times that a job lets one from behind go first
local PRIORITY = 1e12  -- jobs whose scores differ by less have one class and priority

-- Ready jobs that the caller can run: the first one and, where `several`, those of its class and priority.
local function choices(ready, prefix, lowest, highest, several)
  local found, rank = {}, nil
  local entries = redis.call('ZRANGE', ready, 0, WINDOW - 1, 'WITHSCORES')
  for i = 1, #entries, 2 do
    local id, its_rank = entries[i], math.floor(tonumber(entries[i + 1]) / PRIORITY)
    local job = redis.call('HMGET', prefix .. 'job:' .. id, 'attempt', 'v', 'inputs')
    if not job[1] then
      redis.call('ZREM', ready, id)
    elseif rank and rank ~= its_rank then
      break
    elseif redis.call('EXISTS', prefix .. 'lease:' .. id) == 0 then
      local v = tonumber(job[2])
      if v >= lowest and v <= highest then
        rank = its_rank
        found[#found + 1] = {id = id, attempt = job[1], inputs = job[3] or ''}
        if not several then break end
      end
    end
  end
  return found
end

-- Which of them has most bytes of its inputs among the marks that the worker holds; the first one of equals. Nobody
-- goes before a job that has been passed over too often. An agent's user that has no rights on the counts (older than
-- these) gets the first.
local function preferred(found, prefix, cached)
  local held, best, most, ids, any = {}, 1, 0, {}, false
  for _, job in ipairs(found) do any = any or job.inputs ~= '' end
  if not any then return 1 end
  for mark in string.gmatch(cached, '[^,]+') do held[mark] = true end
  for i, job in ipairs(found) do
    local bytes = 0
    for mark, size in string.gmatch(job.inputs, '(%x+) (%d+)') do
      if held[mark] then bytes = bytes + tonumber(size) end
    end
    job.bytes, ids[i] = bytes, job.id
    if bytes > most then best, most = i, bytes end
  end
  if best == 1 then return 1 end
  local passed = redis.pcall('HMGET', prefix .. 'passed', unpack(ids))
  if passed.err then return 1 end
  best, most = 1, found[1].bytes
  for i = 1, #found do
    if found[i].bytes > most then best, most = i, found[i].bytes end
    if tonumber(passed[i] or '0') >= MAX_PASSED then break end
  end
  for i = 1, best - 1 do redis.call('HINCRBY', prefix .. 'passed', ids[i], 1) end
  return best
end

-- KEYS: ready set, worker entry. ARGS: group prefix, worker, incarnation, token, public key, lease_ms,
-- protocol_min, protocol_max. Returns {} or {execution id, job JSON, attempt}.
-- The job leaves the ready set and its lease is written in this one step: a worker that dies right after
-- still holds a lease that expires.
local function take(keys, args)
  local prefix = args[1]
  local entry = redis.call('HMGET', keys[2], 'incarnation', 'state', 'cached', 'machine_id')
  if entry[1] ~= args[3] or entry[2] == 'draining' then return {} end
  if entry[4] and redis.pcall('EXISTS', prefix .. 'sealed:' .. entry[4]) == 1 then return {} end
  local cached = entry[3] or ''
  local found = choices(keys[1], prefix, tonumber(args[7]), tonumber(args[8]), cached ~= '')
  if #found == 0 then return {} end
  local job = found[#found > 1 and preferred(found, prefix, cached) or 1]
  local lease = prefix .. 'lease:' .. job.id
  redis.call('ZREM', keys[1], job.id)
  if cached ~= '' then redis.pcall('HDEL', prefix .. 'passed', job.id) end
  redis.call('HSET', lease, 'worker', args[2], 'incarnation', args[3], 'token', args[4],
    'attempt', job.attempt, 'public_key', args[5], 'taken_ms', tostring(now_ms()), 'phase', 'leased')
  redis.call('PEXPIRE', lease, tonumber(args[6]))
  return {job.id, redis.call('HGET', prefix .. 'job:' .. job.id, 'job'), job.attempt}
end

-- KEYS: lease, job. ARGS: worker, incarnation, token, attempt, public key, lease_ms, phase.
-- Returns 'held', 'restored' (Redis had lost it and nobody else has it) or 'lost' (fenced: stop).
local function renew(keys, args)
  local token = redis.call('HGET', keys[1], 'token')
  if token == args[3] then
    redis.call('HSET', keys[1], 'phase', args[7])
    redis.call('PEXPIRE', keys[1], tonumber(args[6]))
    return 'held'
  end
  if token then return 'lost' end
  local attempt = redis.call('HGET', keys[2], 'attempt')
  if attempt and attempt ~= args[4] then return 'lost' end
  redis.call('HSET', keys[1], 'worker', args[1], 'incarnation', args[2], 'token', args[3], 'attempt', args[4],
    'public_key', args[5], 'taken_ms', tostring(now_ms()), 'phase', args[7])
  redis.call('PEXPIRE', keys[1], tonumber(args[6]))
  return 'restored'
end

-- KEYS: reports stream, lease. ARGS: token, report JSON. Returns 1, or 0 when the lease is not the caller's now.
-- Nothing gets past a Redis that was emptied before the agent has renewed its lease and learned of the loss, so
-- reports stay in order; and a fenced agent cannot report at all.
local function report(keys, args)
  if redis.call('HGET', keys[2], 'token') ~= args[1] then return 0 end
  redis.call('XADD', keys[1], '*', 'r', args[2])
  return 1
end

-- KEYS: grant stream, lease. ARGS: token. Hands the sealed entries over once and deletes them.
local function collect_grants(keys, args)
  if redis.call('HGET', keys[2], 'token') ~= args[1] then return {} end
  local out = {}
  for _, entry in ipairs(redis.call('XRANGE', keys[1], '-', '+')) do
    out[#out + 1] = entry[2][2]
  end
  redis.call('DEL', keys[1])
  return out
end

-- KEYS: ready set, job, lease, sequence, bell. ARGS: execution id, job JSON, attempt, version, base score, force, and
-- what its inputs are (`mark bytes,...`; an older control plane does not say).
-- Puts a job into the queue, behind all of its class and priority, and wakes an agent. Does nothing while a later
-- attempt is known, nor, without force, the same one. Returns {1, how many are ahead} or {0, 0}.
local function enqueue(keys, args)
  local known = tonumber(redis.call('HGET', keys[2], 'attempt') or '0')
  local attempt = tonumber(args[3])
  if known > attempt or (known == attempt and args[6] ~= '1') then return {0, 0} end
  if attempt > known then redis.call('DEL', keys[3]) end
  redis.call('HSET', keys[2], 'job', args[2], 'attempt', args[3], 'v', args[4], 'inputs', args[7] or '')
  redis.call('ZADD', keys[1], tonumber(args[5]) + redis.call('INCR', keys[4]), args[1])
  redis.call('RPUSH', keys[5], '1')
  redis.call('LTRIM', keys[5], -64, -1)
  return {1, redis.call('ZRANK', keys[1], args[1])}
end

-- KEYS: ready set, lease. ARGS: execution id. Takes a job that nobody has leased out of the queue.
-- Returns 1 when it is now out of the queue and unleased, 0 when a worker has it.
local function withdraw(keys, args)
  if redis.call('EXISTS', keys[2]) == 1 then return 0 end
  redis.call('ZREM', keys[1], args[1])
  return 1
end

-- KEYS: lease of a shard. ARGS: holder, ttl_ms, prefix of holders that are known to be gone (or '').
-- Returns 2 when the caller held it, 1 when it was free, 0 when somebody else has it.
local function claim(keys, args)
  local holder = redis.call('GET', keys[1])
  local gone = holder and args[3] ~= '' and string.sub(holder, 1, #args[3]) == args[3]
  if holder and holder ~= args[1] and not gone then return 0 end
  redis.call('SET', keys[1], args[1], 'PX', tonumber(args[2]))
  return holder == args[1] and 2 or 1
end

-- KEYS: lease of a shard. ARGS: holder. Gives it up, if it is the caller's.
local function unclaim(keys, args)
  if redis.call('GET', keys[1]) ~= args[1] then return 0 end
  return redis.call('DEL', keys[1])
end

-- KEYS: the conductors. ARGS: caller, ttl_ms, prefix of conductors that are known to be gone (or ''). Returns the living.
local function muster(keys, args)
  local now = now_ms()
  redis.call('ZADD', keys[1], now + tonumber(args[2]), args[1])
  redis.call('ZREMRANGEBYSCORE', keys[1], '-inf', now)
  local living = {}
  for _, name in ipairs(redis.call('ZRANGE', keys[1], 0, -1)) do
    if args[3] ~= '' and name ~= args[1] and string.sub(name, 1, #args[3]) == args[3] then
      redis.call('ZREM', keys[1], name)
    else
      living[#living + 1] = name
    end
  end
  return living
end

redis.register_function('vh1_heartbeat', heartbeat)
redis.register_function('vh1_take', take)
redis.register_function('vh1_renew', renew)
redis.register_function('vh1_report', report)
redis.register_function('vh1_collect_grants', collect_grants)
redis.register_function('vh1_enqueue', enqueue)
redis.register_function('vh1_withdraw', withdraw)
redis.register_function('vh1_claim', claim)
redis.register_function('vh1_unclaim', unclaim)
redis.register_function('vh1_muster', muster)
