"""Operations, one file each: reference first, fast versions beside it."""
