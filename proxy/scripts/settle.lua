-- Charges a quota for what was used already, whether there is room or not, in the window in which it was used.
--
-- KEYS: the quota's. ARGV: not after (microseconds of this server's clock; 0: whenever); kind; window (seconds);
-- an id of its own; then pairs: an amount (below 0: given back), and how long ago it was used (microseconds).
-- Gives "late", or: now, this window's count, the last one's.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
if tonumber(ARGV[1]) > 0 and now > tonumber(ARGV[1]) then
  return 'late'
end
local key, window = KEYS[1], ARGV[3] * 1000000

if ARGV[2] == 'm' then
  for place = 5, #ARGV, 2 do
    local at = now - ARGV[place + 1]
    for number = 1, at > now - window and tonumber(ARGV[place]) or 0 do
      redis.call('ZADD', key, at, ARGV[4] .. ':' .. place .. ':' .. number)
    end
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
for place = 5, #ARGV, 2 do
  local amount, used = tonumber(ARGV[place]), math.floor((now - ARGV[place + 1]) / window)
  if used >= at then
    current = math.max(0, current + amount)
  elseif used == at - 1 then
    previous = math.max(0, previous + amount)
  end
end
redis.call('HSET', key, 'i', at, 'c', current, 'p', previous)
redis.call('PEXPIRE', key, math.ceil(2 * window / 1000))
return string.format('%.0f %.0f %.0f', now, current, previous)
