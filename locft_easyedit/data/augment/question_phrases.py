"""Questions that ask the same of a subject X, and statements that take the same answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from .canonical import Canonical, canonical
from .grammar import SLOT, asks_who, capital, finite, small

# Every form of a line may replace every other one, because the same short answer fits: a name stays
# a name, a country does not become a nationality. A question is found in the form that `canonical`
# gives it, so that a line need not hold it with "which" for "what", "was" for "is" or "In what" for
# "what ... in". A statement is only ever given.
#   @noun      "Who is the noun of X?" and "X's noun is"
#   verb~      the verb in the tense of the question that was asked; "is", "has" and "does" go into
#              the past with the question without that, a past of the table stays one
#   < form     is found and never given: vague, or no good English
#   > form     is given and never found: other lines say more than it does
#   Y=a/b: ..  one line for each noun in place of Y
_FAMILIES = """
Who directed X? | @director | X was directed by | Who was responsible for directing X? | Which director made X? | Under whose direction was X made? | <What director helmed X? | <What director directed X? | <What director worked on X? | <Whose direction is X? | Who was X directed by?
Who created X? | @creator | X was created by | Which person created X? | Who was behind the creation of X? | Who came up with X? | X is the creation of | Who was X created by? | Who was responsible for the creation of X?
Who designed X? | @designer | X was designed by | Which person designed X? | Who was responsible for the design of X? | Who was X designed by? | <Who desigened X? | <What is the designor of X?
@architect | Who was the architect that designed X? | Which architect designed X? | X was designed by the architect | Which architect was responsible for X? | Which architect drew up the plans for X? | The architect behind X was | <Who is the architect involved with X? | <What person is the architect of X? | <What is the X architect? | <Who is the architect who worked on X? | >Who designed X?
Who developed X? | @developer | X was developed by | Which developer made X? | X's development was the work of | Who was X developed by? | Who was responsible for the development of X?
Who invented X? | @inventor | X was invented by | Who came up with X? | X is the invention of | Which inventor devised X? | Who is credited with the invention of X? | Who was X invented by?
Who discovered X? | @discoverer | X was discovered by | Which person discovered X? | Who is credited with the discovery of X? | X is the discovery of | Who made the discovery of X? | Who was X discovered by? | Who was the first to find X?
Who wrote X? | @author | @writer | X was written by | Which author wrote X? | X is the work of the writer | Who is credited with the writing of X? | Who was X written by?
Who composed X? | @composer | X was composed by | Which composer wrote X? | Who wrote the music of X? | Who was X composed by?
Who painted X? | @painter | X was painted by | Which artist painted X? | X is a painting by | Who was X painted by? | <What artist created X?
Who illustrated X? | @illustrator | X was illustrated by | Who drew the illustrations for X? | Who was the artist that illustrated X? | The illustrations in X are by | Who was X illustrated by?
Who edited X? | @editor | X was edited by | Who was X edited by?
Who produced X? | X was produced by | @producer | Who was X produced by? | Who was in charge of the production of X?
Who founded X? | @founder | X was founded by | Who established X? | Who set up X? | Which person founded X? | Who was X founded by?
Who owns X? | @owner | X is owned by | Who is X owned by? | To whom does X belong? | X belongs to | X is the property of
Who is X by? | X is by | X is the work of | X was made by | >Who made X? | >Who created X?
Who manufactured X? | Who manufactures X? | @manufacturer | X was manufactured by | Which company made X? | X was made by | What company manufactured X? | What company manufactures X? | What company makes X? | Which manufacturer makes X? | Which company was X made by? | The company that makes X is | <Who makes X?
What company built X? | @builder | X was built by | Which company was X built by? | X was constructed by | Which company constructed X? | Which builder made X? | The company that built X was
What company produced X? | X was produced by | Which company was X produced by? | What company was behind the production of X? | X is a product of | The company that produced X was
What corporation created X? | X was created by | Which company created X? | X was made by | Which corporation made X? | Which corporation was behind the creation of X? | Which corporation was X created by? | X is a creation of
What is the product made by X? | What product does X make? | What does X make? | X makes | The product of X is | What does X produce? | Which product comes from X?
@publisher | Who published X? | X was published by | Which publisher brought out X? | What company published X? | Which publishing house published X? | X came out with the publisher | <What publisher published X?
@distributor | Who distributed X? | X was distributed by | Which company distributed X? | Which distributor handled X? | Who was X distributed by? | Who handled the distribution of X?
What studio produced X? | X was produced by the studio | Which studio made X? | Which film studio was behind X? | At which studio was X made? | The studio behind X was | What studio was responsible for X? | <@studio
@production company | What production company was involved in X? | Which production company made X? | >What company produced X? | X was produced by | Which production company was behind X? | X is a production of | <What production company is involved with X? | <What production company is X from?
@record label | What label is~ X on? | What record label is~ X with? | X is~ on the record label | Which record company is~ X with? | X's label is~ | What label do~ X belong to? | @label
What label released X? | What record label released X? | Which record company put out X? | X was released by | X was released on the label | Which label was X released on? | What label was responsible for X? | Which label issued X? | >@record label
Who performed X? | @performer | X was performed by | Which artist performed X? | Who was X performed by? | Which musical act performed X? | <What is the artist or group what originally performed X? | <What is X by what artist? | <What artist is X by?
What artist released X? | Which performer released X? | X was released by | Which artist put out X? | Who released X? | Which artist was X released by? | X is by the artist | X was recorded by | <What artiste does X come from? | >Who performed X?
Who starred in X? | @star | Which actor starred in X? | Who had the leading role in X? | X starred | Who was the lead in X? | <Who are the stars of X? | >Who acted in X?
Who acted in X? | Who featured in X? | Who appeared in X? | Who is in the cast of X? | Which actor appeared in X? | Who is a cast member of X? | <Who is in X as a cast member? | The cast of X includes | Among the actors in X is | Who are the cast members of X? | <Who are the stars of X?
Who fathered X? | @father | @dad | X was fathered by | Which man is the father of X? | X's male parent is | <@male parent | <@paternal figure | Who is X's male parent?
@mother | @mom | Who gave birth to X? | Which woman gave birth to X? | X was born to | Which woman is the mother of X? | X's female parent is | <What lady gave birth to X? | <What is the person that is the mother of X? | <@female parent | Who is X's female parent?
@spouse | Who is X married to? | X is married to | To whom is X married? | @marriage partner | Who did X marry? | X married
@wife | Which woman is married to X? | >Who is X married to? | >@spouse | >X is married to
@husband | Which man is married to X? | >Who is X married to? | >@spouse | >X is married to
@sister | Who is a sister of X? | Which woman is a sister of X? | X's female sibling is | X is a sibling of | X has a sister called | <Which woman is the sister of X?
@brother | Who is a brother of X? | Which man is a brother of X? | X's male sibling is | X is a sibling of | X has a brother called | <Which man is the brother of X?
@child | Who is a child of X? | X is the parent of | X has a child called | X's offspring is
Who was X named after? | Who was X named for? | X was named after | X was named for | After whom was X named? | Who gave X its name? | Who is the namesake of X? | X takes its name from | X got its name from | From whom did X get its name? | In whose honor was X named?
@cause of death | What did X die of? | X died of | What killed X? | What caused X's death? | What was the cause of X's death? | What did X die from? | X's death was caused by | X was killed by | What was responsible for the death of X? | What led to X's death? | <What cause of death was listed for X? | <What caused the death of X?
How did X die? | In what way did X die? | @manner of death | What was the manner of X's death? | <In one word, how did X die? | X's manner of death was
What disease did X have? | What illness did X have? | What disease did X suffer from? | X suffered from | What illness afflicted X? | X was ill with | From which disease did X suffer? | With which disease was X diagnosed? | X had the disease | Which disease was X affected by? | What medical condition did X have? | <What disease did X contract? | <What disease did X get?
@gender | @sex | What sex is X? | What gender is X? | Is~ X male or female? | What gender is X known by? | What gender does X have? | <What is the sex or gender of X? | By gender, X is~ | In terms of gender, X is~ | As which gender is X known? | The sex of X is~
@nationality | What nationality is~ X? | What nationality do~ X have? | Of what nationality is~ X? | By nationality, X is~
@country of citizenship | What country is X a citizen of? | What country does X hold citizenship of? | X is~ a citizen of | Of which country do~ X have citizenship? | In what country do~ X have citizenship? | <What country's citizen is X? | <What country's citizenship does X hold? | <What country does X belong as its citizen to? | Which country is~ X a national of? | <@citizenship
@native language | @mother tongue | @first language | What language did X grow up speaking? | X's mother tongue is~ | The first language X learned was | What is~ X's native tongue? | X is~ a native speaker of | Which language is~ X a native speaker of? | <@native tongue
@language | What language is~ X in? | X's language is~ | The language of X is~
What language is X written in? | X is~ written in | X is~ written in the language | What language is~ used in X? | In which language was X written? | What is~ the language of X's text? | <What language is X made in? | >@language
What language is X in? | <What language is X made in? | X is~ in the language | >What language is~ used in X? | >@language | X's language is~
What language does X speak? | X speak~ | Which language do~ X use? | X speak~ the language | What is~ the language spoken by X? | X is~ a speaker of
What programming language is X written in? | @programming language | What computer language is~ X written in? | X is~ written in | X is~ written in the programming language | In which programming language was X coded? | What programming language was used to write X? | X is~ programmed in | Which coding language is~ X written in?
What position does X play? | @playing position | What role do~ X play in the team? | X play~ in the position of | X play~ as | In which position do~ X play? | In what playing position do~ X line up? | What position is played by X? | X's playing position is~ | As what do~ X play? | <What position does X play on the field? | >@position
What position does X play in football? | @football position | What role does X play in football? | X's position in football is~ | In what position do~ X play football? | As what do~ X play football? | In football, X play~ as | <What capacity does X play football in? | X's football position is~ | What is~ X's role on the football pitch?
What is X specialty in their profesisonal sport? | <What is X's specialty in their professional sport? | What is~ X's specialty in sport? | In sport, X specialize~ as | What role do~ X have in their sport?
@position | What position do~ X have? | What position do~ X occupy? | X has~ the position of | In which position is~ X? | What post or role do~ X have? | X's position is~ | The position X has~ is~ | >X's role is~
What position does X hold? | What position is held by X? | What post do~ X hold? | What office do~ X hold? | X hold~ the position of | X serve~ as | In which position do~ X serve? | X hold~ the office of | >@position
What title does X hold? | What title is held by X? | What title does X have? | X hold~ the title of | X's title is~ | Which title belong~ to X? | X has~ the title of | By what title is~ X known? | >@title
@noble title | What noble title does X hold? | What noble title does X have? | What title of nobility do~ X hold? | X hold~ the noble title of | What is~ X's title in the nobility? | X's noble title is~ | What rank of nobility do~ X have? | X's title of nobility is~
@occupation | @profession | @career | @job | What occupation does X have? | What do~ X do for a living? | What kind of work do~ X do? | By profession, X is~ | X work~ as | X's line of work is~ | What type of occupation does X have? | <What does X do?
@voice type | @vocal range | What voice type does X have? | What type of voice do~ X have? | What kind of singing voice do~ X have? | X's voice type is~ | X's vocal range is~ | What voice part do~ X sing? | X's singing voice is~ | <What voice type is X? | <What type of tone does X sing in?
@range | What range do~ X have? | X has~ the range of | X's range is~
What instrument is X scored for? | For what instrument was X written? | X was written for the | For which musical instrument was X composed? | What instrument was X meant for? | X is scored for | X was composed for the | <What musical instrument is X intended for? | <What type of instrument is X designed for? | <What instrument is X designed for?
What instrument does X play? | X play~ the | Which musical instrument do~ X play? | X's instrument is~ the | On which instrument do~ X perform? | >@instrument
What team does X play for? | @team | What sports team does X play for? | What club does X play for? | X play~ for | What sports team is X a member of? | What sports team is X playing for? | What team is X associated with? | What team is X a member of? | X is~ on the team | X's club is~ | X is~ a player of | For which club do~ X play? | @sports team | What side do~ X play for? | <What is the sports team whose member is X? | <What team is X on?
What league is X in? | @league | What league does X play in? | What league does X participate in? | What league does X compete in? | What league is~ X a member of? | X play~ in the league | X compete~ in the | X's league is~ | <What sports league is X a member of? | In which competition league is~ X?
What football league is X a part of? | What football league does X play in? | Which football league is~ X in? | X play~ in the football league | X's football league is~ | In which football league do~ X compete? | What soccer league is X in? | Which soccer league do~ X compete in?
@home stadium | What home stadium does X play in? | Where does X play its home games? | Where do X play their home games? | @home ground | In which stadium do~ X play home games? | X play~ home games at | What stadium is~ home to X? | X's home venue is~ | <What stadium is X? | <What is the hoe stadium of X? | At which stadium do~ X play home matches? | <Where does X play its game? | <@stadium
What sport does X play? | X play~ the sport of | In which sport do~ X compete? | X's sport is~ | Which sport do~ X practise? | >@sport
What conflict did X participate in? | What war did X fight in? | What war did X serve in? | What war was X in? | What war was X a part of? | What war did X participate in? | What conflict was X a part of? | In which conflict did X fight? | X fought in | X took part in | X was involved in | Which war did X take part in? | Which war was X involved in? | What conflict involved X? | <What is the war that X fought in? | <What historic war does X participate? | <What war or battle does X fight in? | <What war does X fought in?
Y=college/university/school: What Y did X attend? | What Y did X go to? | At which Y did X study? | Where did X go to Y? | X attended the Y | X was a student at | Which Y did X study at? | What Y educated X? | X was educated at | X studied at | <What Y does X go in? | <What is the name Y that educated X? | <What is the name of Y that educated X? | Which Y was X a student at?
Where did X study or work? | At which institution did X study or work? | X studied or worked at | What place did X study or work at? | With which institution was X as a student or employee?
What college or university is X related with? | <What college or university is related with X? | With which college or university is X associated? | X is associated with the college or university | Which college or university is X linked to? | Which college or university has ties with X? | What college or university is connected to X? | X has ties to
What constellation is X in? | What constellation is X a part of? | What constellation is X part of? | What constellation does X belong to? | What constellation is X located in? | In which constellation does X lie? | X is in the constellation | X belongs to the constellation | X lies in the constellation of | In which constellation can X be found? | Which constellation contains X? | <What constellation does X belong in? | <What constellation is where X is? | <@constellation | Which constellation is home to X? | <What constellation is made with X? | <What constellation is formed by X?
What continent is X on? | @continent | What continent is X located on? | On which continent does X lie? | X is located on the continent of | X lies on the continent of | What is the name of the continent X is on? | On which continent can X be found? | On what continent is X situated? | Which continent is home to X? | <What continent can X be found on? | <What continent is X found on? | <What continent X located in? | <What continent is X located? | <What continent is X in? | <What continent is X located in? | Which continent does X belong to?
What river system contains X? | What river system is X in? | X is part of the river system | To which river system does X belong? | Which river system is X a part of? | X belongs to the river system
What river is X a tributary of? | What is X a tributary of? | X is a tributary of | X flows into | Into which river does X flow? | Which river does X flow into? | X is a tributary of the river | Which river is fed by X? | X drains into | What river does X form a part of? | Into what river does X empty?
What river does X cross? | What river does X cross over? | Over which river does X pass? | X crosses the | X spans the | Which river does X span? | Which river is crossed by X? | Which river does X go over? | Which river runs under X? | <What does X cross over?
What does X cross over? | What does X cross? | X crosses | X spans | What does X span? | What is crossed by X? | Over what does X pass? | What runs under X?
What body of water is X near? | What body of water is X by? | What body of water is X located by? | On which body of water does X lie? | Which body of water is X next to? | X is next to the body of water | X lies by the | X is near the body of water | <What is the body of water by X? | Which body of water is close to X?
Y=planet/astronomical body: What Y is X on? | What Y is X located on? | On which Y does X lie? | X is on | X is located on the Y | On which Y can X be found? | <What Y is X located? | Which Y is home to X? | Which celestial body is X on? | X is a feature on the surface of | <What Y is X located in?
Y=state/country/town/province/city/county/region/district: What Y is X in? | What Y is X located in? | In which Y does X lie? | X is in the Y of | X lies in the Y of | X is situated in | In which Y can X be found? | In which Y is X situated? | What is the name of the Y X is in? | <What Y is X located? | The Y in which X lies is
What place is X in? | In which place is X located? | X is in | X is located in | >Where is X? | >What is the location of X?
Where is X located? | Where is X? | Where can X be found? | X is located in | X can be found in | Where is X situated? | @location | >In what place is X? | X lies in
@home city | What city is~ home to X? | X's home city is~ | In which city is~ X at home? | What city do~ X call home? | What is~ X's home town? | Which city is~ X from? | X is~ from the city of
@city of origin | What city is X from? | From which city do~ X come? | Which city do~ X come from? | X come~ from the city of | X is~ from | X originate~ from the city of | What city do~ X hail from? | <From what city is the band X?
Where is X from? | Where do~ X come from? | X is~ from | From where do~ X come? | X come~ from | @place of origin | Where do~ X hail from? | X hail~ from
@country of origin | What country is X from? | What country does X originate from? | What country does X come from? | X is~ from the country of | X come~ from | In which country did X originate? | X originated in | <What country does X originate? | What country does X originate in? | From which country do~ X hail?
@country | What country does X belong to? | What country is~ X associated with? | X's country is~ | X is~ associated with the country of
What country does X live in? | In what country did X reside? | X lived in | What was X's country of residence? | X was a resident of | Which country was X a resident of? | Which country was home to X? | X resided in
What country released X? | In which country was X released? | X was released in | X came out in | Which country did X come out in?
What city did X form in? | What city was X formed in? | X was formed in | In which city did X get together? | In what city was X founded? | X was founded in the city of | In which city did X start out? | X got together in
Y=he/she/they: What city was X living in at the time of death? | <What city does X live when Y died? | <What city does X live in when Y died? | Which city was home to X at the time of death? | Which city did X live in at the end of life? | At the time of death, X lived in | In what city did X live at death? | What was X's city of residence at death? | When X died, X lived in
Y=he/she/they: Where was X living at the time of death? | <Where does X live when Y died? | At the time of death, X lived in | What place was home to X at the time of death? | What was X's place of residence at death? | Where did X reside when Y died? | When X died, X lived in
What town does X serve? | What town or city does X serve? | What city does X serve? | X serves | Which town or city is served by X? | Which community does X serve? | X's community is | Which town or city is X aimed at?
What town is X licensed in? | <What town is X liscensed in? | To what town is X licensed? | X is licensed in | Which town holds the license of X? | In which town does X have its license? | @town of license | X has its license in
What network did X air on? | What network aired X? | @network | @original network | What network broadcast X? | What network is X on? | What network was X shown on? | X aired on | X was broadcast on | X was shown on the network | What channel was X on? | On which channel did X run? | What channel broadcast X? | <What network does X originally air on? | <What original network is X on? | <What is the original channel that X played on? | <What network is X a part of? | <What network is X available on? | <@original channel | <What original channel does X play on? | Which channel aired X?
What series is X from? | What series is X in? | What series is X part of? | What series is X a part of? | What series does X belong to? | What series does X come from? | X is from the series | X belongs to the series | X is a part of the series | Which series includes X? | In which series does X appear? | <What series is the episode X part of? | @series | <What is X part of a what series? | Which series features X?
What show is X from? | What show does X come from? | In which show does X appear? | X is from the show | X is a character on | X appears in the show | Which show features X? | Which TV show is X in?
Y=fictional work/work of fiction/piece of fiction: What Y does X appear in? | What Y does X exist in? | What Y is X a character in? | In what Y can X be found? | X appears in | X is a character in | Which Y features X? | What Y is X from? | Which Y has X as a character? | <What Y is X a character? | <What Y would you find a character named X in? | <What work is the appearance of X seen in? | Of which Y is X a character? | X is a fictional character in | In what fictional work is X a character? | In which work of fiction does X occur?
What fictional universe is X in? | What fictional universe is X a part of? | What fictional universe is X part of? | What fictional universe is X from? | What fictional universe does X exist in? | What fictional universe does X appear in? | What fictional universe does X belong to? | What fictional universe is X associated with? | X exists in the fictional universe | X belongs to the fictional universe of | Which fictional world is X from? | Which fictional universe features X? | X is a part of the fictional universe called | <What universe does X exist in? | <What universe is X in? | <What type of universe is X a fictional character in? | What fictional universe is home to X?
What family is X in? | What family is X a part of? | What family does X belong to? | What family is X of? | @family | X belongs to the family | X is in the family | X is a member of the family | Which family includes X? | Into which family is X classified? | What is the name of the family of X? | Which family is X a member of? | <What type of family is X of? | <What family does X belong? | Under which family is X classified?
What type of submarine was X classified as? | What class of submarine was X? | X was classified as a submarine of the type | What type of submarine was X? | What kind of submarine was X? | What is X's submarine class? | X was a submarine of the type | As what type of submarine was X classed?
What type of vessel was X? | <What specific type of seafaring vessel is X? | <What type of aquatic unit is X? | <What vessel type is X? | What class of ship was X? | What kind of ship was X? | What is X's vessel class? | What type of ship was X? | X's class of ship is | To which class of ships does X belong? | X's vessel type is
@conservation status | What conservation status does X have? | What is X's status of conservation? | How is X's conservation status described? | X's conservation status is | What is the level of threat to X? | X is listed as | As what is X listed in terms of conservation? | <How endangered does the iucn consider X? | <What level is X's iucn conservation status? | <@endangered status | <@ecological status | <@iucn conservation status
@status | What status does X have? | X has the status of
What airport does X operate out of? | What airport does X operate from? | What airport does X operate in? | What airport is X associated with? | @hub airport | What airport is X based at? | From which airport does X fly? | X operates out of | X has its base at | What airport is X part of? | Which airport is home to X? | X's hub is | Which airport does X use as its hub?
@parent company | What company is X part of? | What company owns X? | What company is the parent company of X? | Which company is X a subsidiary of? | X is a subsidiary of | X is owned by | X belongs to the company | To which company does X belong? | X is part of the company | <@parent organization
What industry is X associated with? | @industry | What industry is X in? | X is in the industry of | X operates in the | Which industry does X belong to? | X works in the | In which branch of industry is X active? | Which sector is X in?
What material was used for X? | What is X made of? | What is X made from? | X is made of | X is made from | From what material is X made? | What material does X consist of? | X consists of | What material was X made of? | @material
What is the surface of X made of? | Of what does the surface of X consist? | The surface of X is made of | What material is X's surface made of? | X has a surface of | What covers the surface of X? | @surface material
What is X based on? | What is X based upon? | X is based on | X is based upon | On what is X based? | X was adapted from | What served as the basis of X? | What was the source of X? | What is the source material of X?
What species has X gene? | In which species is X gene found? | X gene is found in the species | In what species does X gene occur? | To which species does X gene belong? | In which species can one find X gene?
What species is X specific to? | To what species is X limited? | X is specific to the species | X is specific to | Which species is X found in? | In which species alone is X found?
What city is X associated with? | With what city is X linked? | X is associated with the city of | X is linked with the city of | Which city is connected to X? | Which city does X have ties to? | X has ties to the city of
Due to which disease did X die? | What disease killed X? | Of which disease did X die? | X died of the disease | X died of | What illness did X die of? | What disease caused X's death? | What disease was responsible for the death of X? | X was killed by the disease | >@cause of death
What was X nominated for? | For what was X nominated? | X was nominated for | What award was X nominated for? | X received a nomination for | Which award was X up for? | Which nomination did X receive? | For which award was X in the running?
What award did X receive? | What award did X win? | X received the | X won the | Which award was X given? | @award | Which prize did X win? | Which honor was X given? | X was honored with the | What prize did X receive?
What was X named after? | What was X named for? | X was named after | X was named for | After what was X named? | X takes its name from | What gave X its name? | From what does X get its name?
What body of water does X join? | What body of water does X flow into? | X flows into | Into which body of water does X flow? | Which body of water does X empty into? | Which body of water does X end in? | X drains into | What body of water does X drain into?
What chromosome is X on? | What chromosome is X located on? | What chromosome can X be found on? | X is located on | X is found on | X lies on | Which chromosome has X? | Which chromosome holds X? | <What chromosome has X on it? | <What is the chromosome where you can find X? | <@chromosome
In what living being can X be found? | In what living being is X found? | In what organism is X found? | In what organism can X be found? | In what species is X found? | In what species can X be found? | Which organism has X? | X is found in | X can be found in | X occurs in the organism | What living thing has X?
Who directed or edited X? | Who was X directed or edited by? | @director or editor | X was directed or edited by | Which person directed or edited X? | Who was the one that directed or edited X?
@screenwriter | Who wrote the screenplay for X? | Who wrote the script for X? | Which screenwriter wrote X? | X was written by the screenwriter | Whose screenplay was X filmed from? | The script for X is by | Who is the scriptwriter of X?
@cinematographer | @director of photography | Who was behind the camera for X? | Who did the cinematography of X? | X was shot by the cinematographer | Which cinematographer shot X?
@film editor | Who did the editing of X? | Which editor cut X? | X was edited by the film editor | Who was the one that cut X? | Who was in charge of the editing of X?
Who sang X? | >@singer | Which singer recorded X? | X was sung by | Who was X sung by? | Which singer performed X? | Whose voice is heard on X?
What genre is X? | @genre | X is in the genre of | What genre does X belong to? | Which genre is X in? | X belongs to the genre of | X's genre is | In which genre is X? | Under which genre does X fall?
What license is X under? | @license | X is released under the | What license does X have? | Under which license is X distributed? | X has the license | Which license does X use? | Which license covers X? | What license applies to X?
What operating system does X run on? | X runs on | Which operating system is X for? | @operating system | X works on the operating system | For which operating system was X made?
@headquarters | Where is X headquartered? | Where is X based? | X is headquartered in | X is based in | In which place does X have its headquarters? | X has its headquarters in | Where is the head office of X? | X's head office is in
What stock exchange is X listed on? | What stock exchange is X traded on? | X is~ listed on the | X is~ traded on the | Which stock exchange lists X? | Which stock exchange trades X? | >@stock exchange
What mountain range is X in? | What mountain range is X a part of? | What mountain range does X belong to? | What range is X part of? | X is in the mountain range | X is part of the | X belongs to the | Which mountain range includes X? | In which mountains is X? | Which mountains is X in?
What military branch did X serve in? | What branch of the military did X serve in? | What branch did X serve in? | X served in the | In which branch of the armed forces was X? | What military force did X serve in? | Which military branch was X in? | @military branch | X was a member of the | <What armed force did X serve in?
@military rank | What military rank did X have? | What military rank did X hold? | >What rank did X hold? | >What rank did X have? | X held the rank of | X had the military rank of | >To which rank did X rise?
What political party is X a member of? | What party does X belong to? | What political party does X belong to? | What party is X a member of? | X is~ a member of the | X belong~ to the party | @political party | Which political party is X with? | Which party is~ X affiliated with? | X is~ a politician of the | @party
@religion | What religion does X follow? | What religion does X belong to? | X's faith is~ | What faith does X have? | Which religion is~ X a follower of? | X is~ a follower of | What religion does X practise? | @faith
What religious order is X a member of? | What religious order does X belong to? | @religious order | X belong~ to the religious order | X is~ a member of the religious order | Which religious order is~ X in? | Of which religious order is~ X a member?
Where was X buried? | Where is X buried? | @burial place | @place of burial | X was buried in | Where was X laid to rest? | Where is the grave of X? | X was laid to rest in | In what place is X buried? | X's grave is in | <In what cemetery is X buried?
What architectural style is X in? | What style of architecture is X? | @architectural style | What style is X built in? | X was built in the style of | Which style of architecture does X have? | In which architectural style is X? | Which architectural style does X have? | <What type of architecture is X?
What team drafted X? | Which team was X drafted by? | X was drafted by | Which club picked X in the draft? | Which team picked X in the draft? | By which team was X picked? | X was picked in the draft by
What crime was X convicted of? | What was X convicted of? | Of which crime was X found guilty? | X was convicted of | X was found guilty of | What was X found guilty of? | For which crime was X convicted? | What offense did X commit?
Who is a character in X? | What character is in X? | Which character appears in X? | X has a character called | Who appears as a character in X? | Among the characters of X is | Which character does X feature?
What is X famous for? | What is X known for? | For what is X famous? | For what is X known? | X is~ known for | X is~ famous for | What did X become known for?
Who killed X? | @killer | X was killed by | X was murdered by | Who murdered X? | Who was X killed by? | At whose hands did X die? | @murderer | By whom was X murdered? | @assassin
Who succeeded X? | X was succeeded by | @successor | >Who came after X? | Who was X succeeded by? | Who took over from X?
Who preceded X? | X was preceded by | @predecessor | >Who came before X? | Who was X preceded by? | Whose successor was X?
@coach | @head coach | Who coaches X? | X is~ coached by | Who is~ X coached by? | Who is~ in charge of X as coach? | Which coach do~ X have?
What engine does X have? | What engine powers X? | X is powered by | @engine | What engine is X powered by? | Which engine is used in X? | What engine drives X? | X has the engine
Who commissioned X? | X was commissioned by | Who was X commissioned by? | Who ordered X to be made? | At whose request was X made? | Who gave the commission for X?
What collection is X in? | What collection is X a part of? | X is in the collection of | What museum is X in? | X belongs to the collection of | Which museum has X?
What is X a part of? | X is part of | What does X belong to? | X belongs to | Of what is X a part? | What includes X? | What is X included in?
"""  # noqa: E501 - a family is one line


_AUXILIARIES = {
    "is": ("is", "was"), "do": ("does", "did"), "does": ("does", "did"), "has": ("has", "had"),
}  # fmt: skip

# An event a line: what X did or was in other words, then nouns for it. Those after ">" are given
# and never found, because they say less: what was founded was created, not the other way round.
_EVENTS = """
was born, came into the world | birth
died, passed away | death, >passing
was founded, was established, was set up, was formed, >was created, >came into being | foundation, formation, establishment, founding
was created, was made, >came into being | creation
first existed, came into being, came into existence, originated, was incepted, >was created, >had its beginning | inception, origin
was dissolved, dissolved, >ceased to exist, >came to an end | dissolution
ended, came to an end, >was over, >drew to a close | end
ceased to exist, >came to an end | end
occurred, happened, took place |
was launched, launched | launch
was opened, opened, >opened its doors | opening
was released, came out | release
was published, >came out | publication
was discovered, was found, >was first detected | discovery
was invented, >was devised | invention
was built, was constructed | construction
was written, >was penned | writing
was approved, >was given approval | approval
was commissioned, >was put into commission | commissioning
entered service, went into service, >was put into service | entry into service
premiered, debuted, >was first shown | premiere, debut
first aired, was first broadcast, >was first shown |
started, began, >got under way | start, beginning
expired |
came into use, >was first used, >was put into use |
was found or made, was discovered or made |
was discontinued, >was brought to an end | discontinuation
"""  # noqa: E501 - an event is one line
_INFINITIVES = {
    "came": "come", "died": "die", "passed": "pass", "lost": "lose", "existed": "exist",
    "expired": "expire", "originated": "originate", "had": "have", "dissolved": "dissolve",
    "ceased": "cease", "ended": "end", "drew": "draw", "occurred": "occur", "happened": "happen",
    "took": "take", "launched": "launch", "opened": "open", "entered": "enter", "went": "go",
    "aired": "air", "premiered": "premiere", "debuted": "debut", "started": "start",
    "began": "begin", "got": "get",
}  # fmt: skip


class _Form(NamedTuple):
    """One form of a family: its text, and whether it is found and given."""

    text: str
    is_found: bool
    is_given: bool


def same_questions(masked: str) -> list[str]:
    """Returns what asks the same as a question, or begins a statement with the same answer.

    Args:
        masked: The question, with `english.SLOT` where its subject stands (once), single spaces.
    """
    asked = canonical(masked)
    found: dict[str, None] = {}
    for forms in _by_key().get(asked.key, ()):
        found.update((_rendered(form, asked), None) for form in forms)
    return [text for text in found if "name of" in text or not _asks(text, asked.key)]


def _asks(text: str, key: str) -> bool:
    """Returns whether a text is a form that the rules of grammar make of a question."""
    return text.endswith("?") and canonical(text).key == key


@cache
def _by_key() -> dict[str, list[tuple[str, ...]]]:
    """Returns the forms that are given for each canonical form, family by family."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for family in [*_written(), *event_families()]:
        forms = [form for text in family for form in _read(text)]
        given = tuple(form.text for form in forms if form.is_given)
        keys = (canonical(_rendered(f.text, None)).key for f in forms if f.is_found)
        for key in dict.fromkeys(keys):
            found.setdefault(key, []).append(given)
    return found


def _written() -> Iterator[list[str]]:
    for line in _FAMILIES.strip().splitlines():
        parts = re.fullmatch(r"Y=(?P<nouns>[^:]+): (?P<forms>.*)", line)
        for noun in parts["nouns"].split("/") if parts else [""]:
            forms = re.sub(r"\bY\b", noun, parts["forms"]) if parts else line
            yield [form.strip() for form in forms.split("|")]


def _read(text: str) -> Iterator[_Form]:
    mark, form = text[0], text.lstrip("<>")
    is_found, is_given = mark != ">", mark != "<"
    if form.startswith("@"):
        noun = form[1:]
        wh = "Who" if asks_who(noun) else "What"
        yield _Form(f"{wh} is~ the {noun} of X?", is_found, is_given)
        yield _Form(f"X's {noun} is~", False, is_given)
    else:
        yield _Form(form, is_found and form.endswith("?"), is_given)


def _rendered(form: str, asked: Canonical | None) -> str:
    """Returns a form with the name as it was written and in the tense of what was asked."""
    past = asked is not None and asked.is_past
    if past:
        form = re.sub(r"\b(is|has|does)\b(?!~)", lambda match: _in_tense(match[1], past), form)
    text = re.sub(r"\b([A-Za-z]+)~", lambda match: _in_tense(match[1], past), form)
    named = SLOT if asked is None else asked.named
    return capital(re.sub(r"\bX\b", small(named), text))


def _in_tense(verb: str, past: bool) -> str:
    lower = verb.lower()
    known = _AUXILIARIES.get(lower)
    text = known[past] if known else finite("did" if past else "does", lower) or verb
    return capital(text) if verb[0].isupper() else text


def event_families() -> Iterator[list[str]]:
    """Yields families as `question_relations` reads them.

    "When" fits every answer, and so does "the date of". "On what date" and "in what year" ask for
    more than that, so that "when" may replace them and not the other way round.
    """
    for line in _EVENTS.strip().splitlines():
        verbs, nouns = ([part.strip() for part in half.split(",")] for half in line.split("|"))
        events = [(verb.startswith(">"), verb.lstrip(">")) for verb in verbs]
        named = [(noun.startswith(">"), noun.lstrip(">")) for noun in nouns if noun]
        yield list(_when(events, named))
        yield list(_on_date(events, named))
        yield list(_in_year(events, named))
    yield ["@date", "<@point in time", "<What date is associated with X?", ">When did X happen?",
           ">When did X take place?", ">When did X occur?"]  # fmt: skip
    yield [
        "@final year",
        "@last year",
        "<@ending year",
        "<@end year",
        ">In what year did X end?",
        ">In what year was X over?",
    ]
    for date in ("date of birth", "birth date", "birthday"):
        yield [
            f"<@{date}",
            f"<When was the {date} of X?",
            ">When was X born?",
            ">The date when X was born is",
        ]
        yield [f"<@{date}", ">@date of birth", ">@birth date", ">When was X's birth?"]
    for date in ("date of death", "death date"):
        yield [
            f"<@{date}",
            f"<When was the {date} of X?",
            ">When did X die?",
            ">When did X pass away?",
            ">@date of death",
        ]
        yield [f"<@{date}", ">When was X's death?", ">@day of death", ">The date X died was"]
    yield ["<When did X die?", ">@date of death"]
    yield [f"<The death of X {occurred} on what date?" for occurred in ("occurred", "occured")] + [
        ">When did X die?", ">On what date did X die?", ">When did X pass away?",
        ">What was the date of X's death?", ">@date of death", ">The date X died was",
    ]  # fmt: skip
    yield ["<When was X born?", ">@date of birth", ">@birth date"]
    yield from _places()


def _when(events: list[tuple[bool, str]], nouns: list[tuple[bool, str]]) -> Iterator[str]:
    for only_given, verb in events:
        mark = ">" * only_given
        yield f"{mark}When {_asked(verb)}?"
        yield f"<At what time {_asked(verb)}?"
        yield f">The date when X {verb} is"
    for only_given, noun in nouns:
        mark = ">" * only_given
        yield f"{mark}When was X's {noun}?"
        yield f"{mark}When was the {noun} of X?"
        yield f"{mark}What was the date of X's {noun}?"
        yield f"{mark}What was the date of the {noun} of X?"
        yield f">The date of X's {noun} was"
        yield from (f"<@{noun} date", f"<@date of {noun}")


def _on_date(events: list[tuple[bool, str]], nouns: list[tuple[bool, str]]) -> Iterator[str]:
    for only_given, verb in events:
        if not only_given:
            yield f"On what date {_asked(verb)}?"
        yield f">When {_asked(verb)}?"
        yield f">The date when X {verb} is"
    for _, noun in nouns:
        yield f">When was the {noun} of X?"
        yield f">What was the date of X's {noun}?"
        yield f">X's {noun} was on"


def _in_year(events: list[tuple[bool, str]], nouns: list[tuple[bool, str]]) -> Iterator[str]:
    for only_given, verb in events:
        yield f"{'>' * only_given}In what year {_asked(verb)}?"
        yield f">When {_asked(verb)}?"
        yield f">X {verb} in"
    for i, (_, noun) in enumerate(nouns):
        mark = "<" * (i > 0)  # one of them is enough among the many forms
        yield f"{mark}What was the year of X's {noun}?"
        yield f"<What was the year of the {noun} of X?"
        yield f"<@{noun} year"
        yield f"<What year was the {noun} of X?"
        yield f"<What year witnessed the {noun} of X?"
        yield f"<What is the official year for the {noun} of X?"
        yield f"{'<' * (i > 0) or '>'}The year of X's {noun} was"


def _asked(verb: str) -> str:
    """Returns "did X pass away" for "passed away", and "was X born" for "was born"."""
    first, *rest = verb.split()
    if first == "was":
        return " ".join(["was X", *rest])
    if first == "first":
        return " ".join(["did X first", _INFINITIVES[rest[0]], *rest[1:]])
    return " ".join(["did X", _INFINITIVES[first], *rest])


def _places() -> Iterator[list[str]]:
    """Yields families for where somebody was born or died; "where" may replace "in what city"."""
    for asked, told, noun, place, others in (
        ("was X born", "X was born", "birth", "birthplace", ["did X come into the world"]),
        ("did X die", "X died", "death", "place of death", ["did X pass away"]),
    ):
        where = [f"Where {each}?" for each in (asked, *others)]
        where += [f"@{place}", f"@place of {noun}", f"{told} in", f"In what place {asked}?"]
        where += [f"<At what location {asked}?", f"<@{noun} place", f"The place where {told} was"]
        where += [f"What was the place of X's {noun}?"]
        yield where
        for kind in ("city", "town", "country", "state"):
            yield [
                *(f"In what {kind} {each}?" for each in (asked, *others)),
                f"<What {kind} {asked}?",
                f"<What {kind} was the {place} of X?",
                f"@{kind} of {noun}",
                f"<@{noun} {kind}",
                f"<What was X {noun} {kind}?",
                f"What {kind} saw the {noun} of X?",
                *(f">{form}" for form in where if not form.startswith("<")),
                f"{told} in the {kind} of",
            ]
