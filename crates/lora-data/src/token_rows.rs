//! Token rows in one buffer.

use crate::Row;

/// Rows of tokens with their loss masks, one after another in one buffer: 4 bytes a token.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenRows {
    /// `token << 1 | trained` of each token.
    words: Vec<u32>,
    /// Where each row ends in `words`.
    ends: Vec<u64>,
}

/// A row of [`TokenRows`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenRow<'a>(&'a [u32]);

impl TokenRows {
    /// The largest token id.
    pub(crate) const MAX_TOKEN: u32 = u32::MAX >> 1;

    /// Creates rows from their words and ends. `None` if the ends do not belong to these words.
    pub(crate) fn from_parts(words: Vec<u32>, ends: Vec<u64>) -> Option<Self> {
        let is_whole = ends.last().copied().unwrap_or(0) == words.len() as u64;
        (is_whole && ends.is_sorted()).then_some(Self { words, ends })
    }

    /// The words and ends of the rows.
    pub(crate) fn parts(&self) -> (&[u32], &[u64]) {
        (&self.words, &self.ends)
    }

    /// Returns the number of rows.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Returns whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Returns a row.
    ///
    /// # Panics
    /// There is no row `index`.
    pub fn row(&self, index: usize) -> TokenRow<'_> {
        TokenRow(&self.words[self.start(index)..self.ends[index] as usize])
    }

    /// Returns all rows.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = TokenRow<'_>> {
        (0..self.len()).map(|index| self.row(index))
    }

    /// Adds a row. Its token ids are at most [`Self::MAX_TOKEN`].
    pub(crate) fn push(&mut self, row: &Row) {
        let words = row.tokens.iter().zip(&row.trained);
        self.words.extend(words.map(|(token, trained)| token << 1 | u32::from(*trained)));
        self.ends.push(self.words.len() as u64);
    }

    /// Adds rows after the others.
    pub(crate) fn append(&mut self, mut rows: Self) {
        let start = self.words.len() as u64;
        self.words.append(&mut rows.words);
        self.ends.extend(rows.ends.into_iter().map(|end| start + end));
    }

    /// Keeps as many tokens of each row as `keep` returns, from its start on; 0 removes the row.
    /// `keep` gets the rows in order, with their indices.
    pub(crate) fn shorten(&mut self, mut keep: impl FnMut(usize, TokenRow) -> usize) {
        let (mut rows, mut end, mut start) = (0, 0, 0);
        for index in 0..self.len() {
            let row = start..self.ends[index] as usize;
            start = row.end;
            let kept = keep(index, TokenRow(&self.words[row.clone()])).min(row.len());
            if kept > 0 {
                self.words.copy_within(row.start..row.start + kept, end);
                end += kept;
                self.ends[rows] = end as u64;
                rows += 1;
            }
        }
        self.words.truncate(end);
        self.ends.truncate(rows);
    }

    fn start(&self, index: usize) -> usize {
        index.checked_sub(1).map_or(0, |before| self.ends[before] as usize)
    }
}

impl<'a> TokenRow<'a> {
    /// Returns the number of tokens.
    pub fn len(self) -> usize {
        self.0.len()
    }

    /// Returns whether the row has no tokens.
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// Returns the token ids.
    pub fn tokens(self) -> impl ExactSizeIterator<Item = u32> + 'a {
        self.0.iter().map(|word| word >> 1)
    }

    /// Returns whether each token is a target of the loss. The first one never is.
    pub fn trained(self) -> impl ExactSizeIterator<Item = bool> + 'a {
        self.0.iter().map(|word| word & 1 == 1)
    }

    /// Returns the first tokens of the row, at most `length`.
    pub(crate) fn first(self, length: usize) -> Self {
        Self(&self.0[..self.0.len().min(length)])
    }

    /// Returns `token << 1 | trained` of each token.
    pub(crate) fn words(self) -> &'a [u32] {
        self.0
    }
}

impl FromIterator<Row> for TokenRows {
    fn from_iter<I: IntoIterator<Item = Row>>(rows: I) -> Self {
        let mut all = Self::default();
        rows.into_iter().for_each(|row| all.push(&row));
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token_rows() -> impl Strategy<Value = Vec<Row>> {
        let row = prop::collection::vec((0..=TokenRows::MAX_TOKEN, any::<bool>()), 1..9).prop_map(|row| {
            let (tokens, trained) = row.into_iter().unzip();
            Row { tokens, trained }
        });
        prop::collection::vec(row, 0..9)
    }

    fn rows_of(all: &TokenRows) -> Vec<Row> {
        let of = |row: TokenRow| Row { tokens: row.tokens().collect(), trained: row.trained().collect() };
        all.iter().map(of).collect()
    }

    proptest! {
        #[test]
        fn rows_are_returned_as_they_were_added(rows in token_rows()) {
            let all: TokenRows = rows.iter().cloned().collect();
            prop_assert_eq!(rows_of(&all), rows);
            let (words, ends) = all.parts();
            prop_assert_eq!(TokenRows::from_parts(words.to_vec(), ends.to_vec()), Some(all.clone()));
        }

        #[test]
        fn rows_are_shortened_or_removed(rows in token_rows(), most in 0_usize..9) {
            let mut all: TokenRows = rows.iter().cloned().collect();
            let is_removed = |index: usize| index % 3 == 1;
            let mut seen = Vec::new();
            all.shorten(|index, row| {
                seen.push((index, row.len()));
                if is_removed(index) { 0 } else { most }
            });
            prop_assert_eq!(seen, rows.iter().map(|row| row.tokens.len()).enumerate().collect::<Vec<_>>());
            let mut expected: Vec<Row> = rows;
            let mut index = 0;
            expected.retain_mut(|row| {
                row.tokens.truncate(most);
                row.trained.truncate(most);
                index += 1;
                !is_removed(index - 1) && most > 0
            });
            prop_assert_eq!(rows_of(&all), expected);
        }
    }

    #[test]
    fn ends_of_other_words_are_refused() {
        for ends in [vec![], vec![1], vec![2, 1, 3], vec![4]] {
            assert_eq!(TokenRows::from_parts(vec![0; 3], ends), None);
        }
    }
}
