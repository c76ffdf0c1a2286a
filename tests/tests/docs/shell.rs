//! A parser for the shell commands in the documents.

/// Words that can precede the name of a command.
const KEYWORDS: [&str; 9] = ["!", "do", "done", "else", "if", "then", "time", "until", "while"];

/// The simple commands of a script as lists of words, without keywords, assignments and
/// redirections. Commands in `$(…)` and `<(…)` precede the command around them, in which
/// `SUBSTITUTED` replaces their output.
pub(crate) fn commands(script: &str) -> Vec<Vec<String>> {
    let mut lexer = Lexer { rest: script, ..Lexer::default() };
    lexer.run();
    lexer.commands
}

#[derive(Default)]
struct Lexer<'a> {
    rest: &'a str,
    commands: Vec<Vec<String>>,
    command: Vec<String>,
    word: Option<String>,
    /// Whether the next word is the target of a redirection.
    is_redirected: bool,
}

impl<'a> Lexer<'a> {
    fn run(&mut self) {
        let mut is_quoted = false;
        while let Some(c) = self.rest.chars().next() {
            if self.rest.starts_with("$(") || (self.rest.starts_with("<(") && !is_quoted) {
                self.substitution();
                continue;
            }
            self.rest = &self.rest[c.len_utf8()..];
            match c {
                '\\' => {
                    let next = self.rest.chars().next().unwrap_or('\n');
                    self.rest = self.rest.get(next.len_utf8()..).unwrap_or_default();
                    if next != '\n' {
                        self.push(next);
                    }
                }
                '"' => {
                    is_quoted = !is_quoted;
                    self.word.get_or_insert_default();
                }
                c if is_quoted => self.push(c),
                '\'' => {
                    let (quoted, rest) = self.rest.split_once('\'').unwrap_or((self.rest, ""));
                    self.word.get_or_insert_default().push_str(quoted);
                    self.rest = rest;
                }
                '#' if self.word.is_none() => {
                    self.rest = self.rest.find('\n').map_or("", |end| &self.rest[end..]);
                }
                '<' | '>' => {
                    // Drops the number of a file descriptor.
                    self.word.take_if(|word| word.chars().all(|c| c.is_ascii_digit()));
                    self.end_word();
                    self.is_redirected = true;
                }
                '&' if self.is_redirected && self.word.is_none() => self.push(c),
                '|' | '&' | ';' | '(' | ')' | '\n' => self.end_command(),
                c if c.is_whitespace() => self.end_word(),
                c => self.push(c),
            }
        }
        self.end_command();
    }

    fn push(&mut self, c: char) {
        self.word.get_or_insert_default().push(c);
    }

    fn substitution(&mut self) {
        let mut depth = 0;
        let end = self.rest.char_indices().find_map(|(at, c)| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            (c == ')' && depth == 0).then_some(at)
        });
        let end = end.unwrap_or_else(|| panic!("{:?} has no end", self.rest));
        self.commands.extend(commands(&self.rest[2..end]));
        self.rest = &self.rest[end + 1..];
        self.word.get_or_insert_default().push_str("SUBSTITUTED");
    }

    fn end_word(&mut self) {
        let Some(word) = self.word.take() else { return };
        let is_assignment = word.split_once('=').is_some_and(|(name, _)| {
            !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        });
        let is_before = self.command.is_empty() && (is_assignment || KEYWORDS.contains(&word.as_str()));
        if !std::mem::take(&mut self.is_redirected) && !is_before {
            self.command.push(word);
        }
    }

    fn end_command(&mut self) {
        self.end_word();
        self.is_redirected = false;
        if !self.command.is_empty() {
            self.commands.push(std::mem::take(&mut self.command));
        }
    }
}

#[test]
fn a_script_is_parsed() {
    let script = "A=1 one \"a b\" 'c d' \\\n  e # comment\nfor x in y; do two >out 2>&1; done\n\
                  three | four && five $(six 7) <(eight)\n";
    let words: Vec<String> = commands(script).into_iter().map(|command| command.join("_")).collect();
    assert_eq!(
        words,
        [
            "one_a b_c d_e",
            "for_x_in_y",
            "two",
            "three",
            "four",
            "six_7",
            "eight",
            "five_SUBSTITUTED_SUBSTITUTED"
        ]
    );
}
