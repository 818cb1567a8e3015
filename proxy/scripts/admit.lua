-- Decides one request: every quota is charged, or none is. Times are microseconds of this server's clock.
--
-- KEYS: one for each quota.
-- ARGV: "take" or "peek" (charges nothing); not after (0: whenever); the lease's id; for how long a lease holds;
--       then, in one text, of each quota: kind, amount, window (seconds), cost, shadow.
-- Gives "late", or: admitted, now; then of each quota whether it fits and three numbers after the decision:
--   fixed, sliding   this window's count, the last one's, 0
--   moving           the count, until the oldest leaves, until there is room for the cost
--   concurrency      the count, 0, 0
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
if tonumber(ARGV[2]) > 0 and now > tonumber(ARGV[2]) then
  return 'late'
end

local quotas = {}
local admitted = true

local function read_window(q)
  local stored = redis.call('HMGET', q.key, 'i', 'c', 'p')
  local index = math.floor(now / q.window)
  q.index = tonumber(stored[1]) or index
  q.current = tonumber(stored[2]) or 0
  q.previous = tonumber(stored[3]) or 0
  if index > q.index then -- a clock that steps back turns no window
    q.previous = (q.index == index - 1) and q.current or 0
    q.current = 0
    q.index = index
  end
  if q.kind == 'f' then
    return q.current + q.need <= q.amount
  end
  local left = q.window - now % q.window
  return math.floor(q.previous * (left / q.window) + q.current) < q.amount - q.need + 1
end

-- Reading writes nothing: a script that has written is let on where memory is full, and nobody would hear of it.
local function read_moving(q)
  q.past = now - q.window
  q.live = string.format('(%.0f', q.past)
  q.current = redis.call('ZCOUNT', q.key, q.live, '+inf')
  return q.current + q.need <= q.amount
end

local function read_running(q)
  q.past = now
  q.current = redis.call('ZCOUNT', q.key, string.format('(%.0f', now), '+inf')
  return q.current < q.amount
end

local read = {f = read_window, s = read_window, m = read_moving, c = read_running}

for kind, amount, window, cost, shadow in string.gmatch(ARGV[5], '(%l) (%d+) (%d+) (%d+) (%d)') do
  local q = {kind = kind, amount = tonumber(amount), window = window * 1000000, cost = tonumber(cost)}
  q.key = KEYS[#quotas + 1]
  q.need = math.max(q.cost, 1)
  q.fits = read[kind](q)
  if not q.fits and shadow == '0' then
    admitted = false
  end
  quotas[#quotas + 1] = q
end

if admitted and ARGV[1] == 'take' then
  for _, q in ipairs(quotas) do
    if q.fits and q.cost > 0 then
      q.current = q.current + q.cost
      if q.kind == 'c' then
        redis.call('ZADD', q.key, now + ARGV[4], ARGV[3])
        redis.call('ZREMRANGEBYSCORE', q.key, '-inf', q.past)
        redis.call('PEXPIRE', q.key, math.ceil(ARGV[4] / 1000))
      elseif q.kind == 'm' then
        for number = 1, q.cost do
          redis.call('ZADD', q.key, now, ARGV[3] .. ':' .. number)
        end
        redis.call('ZREMRANGEBYSCORE', q.key, '-inf', q.past)
        redis.call('PEXPIRE', q.key, math.ceil(q.window / 1000))
      else
        redis.call('HSET', q.key, 'i', q.index, 'c', q.current, 'p', q.previous)
        redis.call('PEXPIRE', q.key, math.ceil(2 * q.window / 1000))
      end
    end
  end
end

local told = {admitted and '1' or '0', string.format('%.0f', now)}
for _, q in ipairs(quotas) do
  local one, two = q.previous or 0, 0
  if q.kind == 'm' then
    local oldest = redis.call('ZRANGEBYSCORE', q.key, q.live, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
    one = oldest[2] and oldest[2] + q.window - now or 0
    two = q.window
    if not q.fits then
      local skipped = q.current + q.need - q.amount - 1
      local last = redis.call('ZRANGEBYSCORE', q.key, q.live, '+inf', 'WITHSCORES', 'LIMIT', skipped, 1)
      two = last[2] and last[2] + q.window - now or q.window
    end
  end
  told[#told + 1] = string.format('%d %.0f %.0f %.0f', q.fits and 1 or 0, q.current, one, two)
end
return table.concat(told, ' ')
