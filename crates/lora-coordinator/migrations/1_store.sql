-- Times are nanoseconds since 1970. Blobs are messages of `lora.v1`, aside from `sha256` and `request_sha256`.

CREATE TABLE coordinator (
    -- There is one row.
    id   INTEGER PRIMARY KEY CHECK (id = 1),
    -- How often the store was opened.
    term INTEGER NOT NULL
) STRICT;
INSERT INTO coordinator (id, term) VALUES (1, 0);

CREATE TABLE jobs (
    -- The order of submission.
    sequence        INTEGER PRIMARY KEY AUTOINCREMENT,
    id              TEXT NOT NULL UNIQUE,
    -- NULL: the caller gave none.
    idempotency_key TEXT UNIQUE,
    request_sha256  BLOB NOT NULL,
    spec            BLOB NOT NULL,
    inputs          BLOB NOT NULL,
    priority        INTEGER NOT NULL,
    state           TEXT NOT NULL CHECK (state IN (
        'validating', 'queued', 'preparing', 'running', 'recovering', 'waiting',
        'pausing', 'paused', 'cancelling', 'succeeded', 'failed', 'cancelled')),
    validated       INTEGER NOT NULL CHECK (validated IN (0, 1)),
    generation      INTEGER NOT NULL CHECK (generation >= 0),
    -- JSON, by rank.
    members         TEXT NOT NULL,
    token           TEXT NOT NULL,
    completed_steps INTEGER NOT NULL CHECK (completed_steps >= 0),
    facts           BLOB,
    failure         BLOB,
    base_sha256     TEXT NOT NULL,
    waiting_for     TEXT NOT NULL,
    fruitless       INTEGER NOT NULL CHECK (fruitless >= 0),
    created         INTEGER NOT NULL,
    changed         INTEGER NOT NULL
) STRICT;
CREATE INDEX jobs_by_state ON jobs (state, sequence);

-- Where a job's log ends and begins.
CREATE TABLE logs (
    job             INTEGER PRIMARY KEY REFERENCES jobs (sequence),
    -- Number of the last event.
    events          INTEGER NOT NULL DEFAULT 0,
    -- Given last to a row of `events` or `steps`: the order of arrival over both.
    position        INTEGER NOT NULL DEFAULT 0,
    -- Steps up to this one are no longer kept.
    forgotten_steps INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE events (
    job      INTEGER NOT NULL REFERENCES jobs (sequence),
    number   INTEGER NOT NULL CHECK (number > 0),
    position INTEGER NOT NULL,
    event    BLOB NOT NULL,
    PRIMARY KEY (job, number)
) STRICT, WITHOUT ROWID;

CREATE TABLE steps (
    job      INTEGER NOT NULL REFERENCES jobs (sequence),
    step     INTEGER NOT NULL,
    position INTEGER NOT NULL,
    report   BLOB NOT NULL,
    PRIMARY KEY (job, step)
) STRICT, WITHOUT ROWID;

-- The files under `objects/`.
CREATE TABLE objects (
    sha256 BLOB PRIMARY KEY CHECK (length(sha256) = 32),
    -- Bytes.
    size   INTEGER NOT NULL CHECK (size >= 0),
    -- When a client last uploaded it or asked whether it is there. NULL: it came from a job, and lives as long as a job names it.
    wanted INTEGER
) STRICT, WITHOUT ROWID;

-- What a job reads.
CREATE TABLE inputs (
    job    INTEGER NOT NULL REFERENCES jobs (sequence),
    sha256 BLOB NOT NULL REFERENCES objects (sha256),
    PRIMARY KEY (job, sha256)
) STRICT, WITHOUT ROWID;
CREATE INDEX inputs_by_object ON inputs (sha256);

CREATE TABLE checkpoints (
    job        INTEGER NOT NULL REFERENCES jobs (sequence),
    step       INTEGER NOT NULL CHECK (step >= 0),
    -- That it was uploaded in.
    generation INTEGER NOT NULL,
    sha256     BLOB NOT NULL REFERENCES objects (sha256),
    PRIMARY KEY (job, step)
) STRICT, WITHOUT ROWID;
CREATE INDEX checkpoints_by_object ON checkpoints (sha256);

-- Files of results: of a job that has not succeeded, what has been uploaded so far.
CREATE TABLE results (
    job        INTEGER NOT NULL REFERENCES jobs (sequence),
    name       TEXT NOT NULL,
    generation INTEGER NOT NULL,
    sha256     BLOB NOT NULL REFERENCES objects (sha256),
    PRIMARY KEY (job, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX results_by_object ON results (sha256);
