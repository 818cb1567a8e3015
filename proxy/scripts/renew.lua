-- Holds leases for longer, those that had run out included.
--
-- KEYS: the quota's. ARGV: not after and for how long (microseconds of this server's clock); the leases' ids.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
if tonumber(ARGV[1]) > 0 and now > tonumber(ARGV[1]) then
  return 'late'
end
for place = 3, #ARGV do
  redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[place])
end
redis.call('PEXPIRE', KEYS[1], math.ceil(ARGV[2] / 1000))
return string.format('%.0f', now)
