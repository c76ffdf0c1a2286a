-- What a worker of the job needs in memory, in JSON. NULL: the coordinator could not plan the job, or has not yet.
ALTER TABLE jobs ADD COLUMN needs TEXT;
