"""What an adapter has seen: rows known by hashes, splits cut by content, the record saved beside an adapter."""
