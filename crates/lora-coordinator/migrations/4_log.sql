-- How often the coordinator began to move the write-ahead log into the database's file, and the
-- value of this counter that the file is known to have without the log. `objects/owner.json` has a
-- copy of the second: if the first one in the file is lower, the file is an older copy, and a log
-- beside it was written for another file.
ALTER TABLE coordinator ADD COLUMN log_moves_begun INTEGER NOT NULL DEFAULT 0;
ALTER TABLE coordinator ADD COLUMN log_moves_done INTEGER NOT NULL DEFAULT 0;
