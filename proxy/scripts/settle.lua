-- Charges a quota for what was used already, whether there is room or not.
--
-- KEYS: the quota's. ARGV: not after (microseconds of this server's clock; 0: whenever); kind; window (seconds);
-- amount; an id of its own.
-- Gives "late", or: now, this window's count, the last one's.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
if tonumber(ARGV[1]) > 0 and now > tonumber(ARGV[1]) then
  return 'late'
end
local key, window, amount = KEYS[1], ARGV[3] * 1000000, tonumber(ARGV[4])

if ARGV[2] == 'm' then
  for number = 1, amount do
    redis.call('ZADD', key, now, ARGV[5] .. ':' .. number)
  end
  redis.call('PEXPIRE', key, math.ceil(window / 1000))
  return string.format('%.0f 0 0', now)
end

local stored = redis.call('HMGET', key, 'i', 'c', 'p')
local index = math.floor(now / window)
local at, current, previous = tonumber(stored[1]) or index, tonumber(stored[2]) or 0, tonumber(stored[3]) or 0
if index > at then
  previous = (at == index - 1) and current or 0
  current = 0
  at = index
end
current = current + amount
redis.call('HSET', key, 'i', at, 'c', current, 'p', previous)
redis.call('PEXPIRE', key, math.ceil(2 * window / 1000))
return string.format('%.0f %.0f %.0f', now, current, previous)
