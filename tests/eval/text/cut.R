# Writes dev.txt and test.txt into the working directory: see README.md.
# Rscript cut.R, with the Debian packages r-cran-janeaustenr and r-cran-tokenizers.
cut <- function(lines, first, file, bytes = 300000) {
  from <- grep(first, lines)[1]
  lines <- trimws(lines[from:length(lines)])
  # A paragraph becomes one line.
  number <- cumsum(lines == "")[lines != ""]
  paragraphs <- tapply(lines[lines != ""], number, paste, collapse = " ")
  paragraphs <- gsub(" +", " ", paragraphs)
  whole <- cumsum(nchar(paragraphs, "bytes") + 2) <= bytes
  cat(paragraphs[whole], sep = "\n\n", file = file)
  cat("\n", file = file, append = TRUE)
}
cut(janeaustenr::persuasion, "^Chapter 1$", "dev.txt")
data(mobydick, package = "tokenizers")
cut(strsplit(mobydick, "\r?\n")[[1]], "^CHAPTER 1\\. Loomings", "test.txt")
