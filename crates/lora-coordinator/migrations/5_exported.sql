-- The adapter in the result of a succeeded job (lora.v1.ExportedAdapter).
ALTER TABLE jobs ADD COLUMN exported BLOB;
