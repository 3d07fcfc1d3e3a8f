-- What the site changes of every page on its way to HTML; notebooks stay as they are on GitHub and Colab.
local HTML = FORMAT:match("html") ~= nil
local BADGE = "https://colab.research.google.com/assets/colab-badge.svg"

-- The badge is a file of the site: no page asks another host for it.
local function badge(image)
  if not HTML or image.src ~= BADGE then return nil end
  image.src = "/colab-badge.svg"
  return image
end

-- nbdev sets the first line of a docstring in italics; where the sentence goes on in the next line, all of its paragraph is.
local function docstrings(blocks)
  if not HTML then return nil end
  for i = 2, #blocks do
    local before, block = blocks[i - 1], blocks[i]
    if before.t == "CodeBlock" and block.t == "Para" and #block.content > 2
        and block.content[1].t == "Emph" and block.content[2].t == "SoftBreak" then
      local all = pandoc.List(block.content[1].content)
      for j = 2, #block.content do all:insert(block.content[j]) end
      blocks[i] = pandoc.Para({pandoc.Emph(all)})
    end
  end
  return blocks
end

-- A column of words begins at the left, whatever the table that came out of a cell says.
local function columns(tab)
  if not HTML then return nil end
  for i, spec in ipairs(tab.colspecs) do
    local words, all = 0, 0
    for _, body in ipairs(tab.bodies) do
      for _, row in ipairs(body.body) do
        local text = row.cells[i] and pandoc.utils.stringify(row.cells[i].contents) or ""
        if text ~= "" then all = all + 1 end
        if text:match("%a%a%a") and not text:match("^[%d+-]") then words = words + 1 end
      end
    end
    if spec[1] == "AlignRight" and 2 * words > all then tab.colspecs[i] = {"AlignLeft", spec[2]} end
  end
  return tab
end

return {{Image = badge, Table = columns, Blocks = docstrings}}
