-- Frees leases. KEYS: the quota's. ARGV: the leases' ids.
return redis.call('ZREM', KEYS[1], unpack(ARGV))
