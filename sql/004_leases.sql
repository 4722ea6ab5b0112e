-- Who captures which symbols, for more of them than one host should carry. The symbols fall into
-- SHARDS shards, and a shard is captured by the node that holds its lease. All times are those of
-- the database's clock.

-- The nodes that take part; one that was not seen for the lifetime of a lease does not count.
CREATE TABLE nodes (
    name    text COLLATE "C" PRIMARY KEY,
    shards  integer          NOT NULL,
    seen_at timestamptz      NOT NULL
);

-- Nodes with another number of shards share them out among themselves: while SHARDS is being
-- changed node by node every symbol is captured by at least one of the two groups.
CREATE TABLE leases (
    shards     integer     NOT NULL,  -- into how many the symbols are divided
    shard      integer     NOT NULL,
    owner      text COLLATE "C",
    fence      bigint      NOT NULL DEFAULT 0,  -- grows each time that somebody takes the lease
    expires_at timestamptz NOT NULL DEFAULT '-infinity',
    PRIMARY KEY (shards, shard),
    CHECK (0 <= shard AND shard < shards)
) WITH (fillfactor = 50);
